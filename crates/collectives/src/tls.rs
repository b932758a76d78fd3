//! Certificates of a job: its own authority, one certificate for each rank of each epoch, both ends checked.
//!
//! The store makes the authority when it starts and keeps its key in memory alone. A member makes a key pair for each
//! epoch, sends the public half, and gets a certificate that names its rank and epoch: so a certificate of an old epoch,
//! or of another rank, opens nothing. No key ever travels.
//!
//! The connection on which that happens is encrypted too, though nobody can know the store's certificate beforehand.
//! There it is the token that proves both ends, and the proof is bound to this very TLS session (RFC 9266's exporter,
//! see [`crate::auth`]): whoever sits in between has two sessions and can pass on neither proof.
//!
//! Cost: one P-256 key and signature a member and epoch, under a millisecond.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

use crate::error::Error;

/// Bytes of an uncompressed P-256 point.
const POINT: usize = 65;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn failed(what: &'static str) -> impl Fn(&dyn std::fmt::Display) -> Error {
    move |reason| Error::System { what: what.into(), reason: reason.to_string() }
}

/// The name in a rank's certificate.
pub(crate) fn name(epoch: u64, rank: usize) -> String {
    format!("rank-{rank}.epoch-{epoch}.consort")
}

/// The job's own certificate authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// A public key as a member sends it.
struct Point<'a>(&'a [u8]);

impl PublicKeyData for Point<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl Authority {
    /// A new one.
    pub(crate) fn new() -> Result<Self, Error> {
        let wrong = failed("make the job's certificate authority");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| wrong(&e))?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key).map_err(|e| wrong(&e))?.der().clone();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// The authority's certificate (DER).
    pub(crate) fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// A certificate (DER) for a rank of an epoch that has this public key.
    pub(crate) fn issue(&self, public_key: &[u8], epoch: u64, rank: usize) -> Result<Vec<u8>, Error> {
        if public_key.len() != POINT {
            return Err(Error::invalid(format!(
                "a public key of {} bytes: P-256 has {POINT}",
                public_key.len()
            )));
        }
        let wrong = failed("sign a member's certificate");
        let mut params = CertificateParams::new(vec![name(epoch, rank)]).map_err(|e| wrong(&e))?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&Point(public_key), &self.issuer).map_err(|e| wrong(&e))?;
        Ok(certificate.der().to_vec())
    }

    /// How the store answers TLS; who it is, the token proves.
    pub(crate) fn store_config(&self) -> Result<Arc<ServerConfig>, Error> {
        let wrong = failed("set up TLS for the store");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| wrong(&e))?;
        let params = CertificateParams::new(vec!["store.consort".to_owned()]).map_err(|e| wrong(&e))?;
        let own = params.signed_by(&key, &self.issuer).map_err(|e| wrong(&e))?.der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|e| wrong(&e))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| wrong(&e))?
            .with_no_client_auth()
            .with_single_cert(vec![own], key)
            .map_err(|e| wrong(&e))?;
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// A member's key pair for one epoch.
pub(crate) struct MemberKey(KeyPair);

impl MemberKey {
    /// A new one.
    pub(crate) fn new() -> Result<Self, Error> {
        let wrong = failed("make a key pair");
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Self).map_err(|e| wrong(&e))
    }

    /// The half that travels.
    pub(crate) fn public(&self) -> &[u8] {
        self.0.der_bytes()
    }

    /// Both sides' configurations, from what the store answered.
    pub(crate) fn identity(&self, certificate: &[u8], authority: &[u8]) -> Result<Identity, Error> {
        let wrong = failed("use the certificate that the store gave");
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(authority.to_vec())).map_err(|e| wrong(&e))?;
        let roots = Arc::new(roots);
        let chain = vec![CertificateDer::from(certificate.to_vec())];
        let key = || PrivateKeyDer::try_from(self.0.serialize_der()).map_err(|e| wrong(&e));
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(|e| wrong(&e))?;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| wrong(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key()?)
            .map_err(|e| wrong(&e))?;
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| wrong(&e))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key()?)
            .map_err(|e| wrong(&e))?;
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Identity { server: Arc::new(server), client: Arc::new(client) })
    }
}

/// How a member speaks TLS in one epoch: as who answers and as who calls.
pub(crate) struct Identity {
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) client: Arc<ClientConfig>,
}

/// How a member calls the store: any certificate will do, since the token proves the store afterwards.
pub(crate) fn store_client() -> Result<Arc<ClientConfig>, Error> {
    let wrong = failed("set up TLS towards the store");
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| wrong(&e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TokenDecides(provider())))
        .with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct TokenDecides(Arc<CryptoProvider>);

impl ServerCertVerifier for TokenDecides {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 alone".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_none_gets_no_certificate() {
        let authority = Authority::new().unwrap();
        assert!(matches!(authority.issue(&[4; 12], 1, 0), Err(Error::Invalid { .. })));
        let key = MemberKey::new().unwrap();
        let certificate = authority.issue(key.public(), 1, 0).unwrap();
        assert!(key.identity(&certificate, authority.certificate()).is_ok());
        assert!(
            MemberKey::new().unwrap().identity(&certificate, authority.certificate()).is_err(),
            "not its key"
        );
        assert!(key.identity(b"garbage", authority.certificate()).is_err());
    }
}
