//! TLS on the gateway's socket: certificates from files, or one made on the spot for trying out.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// Why there is no TLS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("TLS can't be set up: {reason}")]
pub struct TlsError {
    /// What is wrong, and what to do.
    pub reason: String,
}

/// A certificate with its key, ready to serve.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    certificate: CertificateDer<'static>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls(…)")
    }
}

impl Tls {
    /// From PEM texts: the chain, the server's own certificate first, and its private key.
    ///
    /// # Errors
    /// [`TlsError`] where one of them is no PEM of its kind, or they don't belong together.
    pub fn new(chain: &[u8], key: &[u8]) -> Result<Tls, TlsError> {
        let wrong = |reason: String| TlsError { reason };
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .map_err(|e| wrong(format!("the certificate file is no PEM: {e}")))?;
        if chain.is_empty() {
            return Err(wrong("the certificate file holds no certificate".to_owned()));
        }
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|e| wrong(format!("the key file holds no private key in PEM: {e}")))?;
        Tls::of(chain, key)
    }

    /// A new certificate for these names, signed by itself: clients have to be told to trust it.
    ///
    /// # Errors
    /// [`TlsError`] where a name can't be in a certificate.
    pub fn self_signed(names: &[String]) -> Result<Tls, TlsError> {
        let wrong = |e: rcgen::Error| TlsError { reason: format!("no certificate could be made: {e}") };
        let made = rcgen::generate_simple_self_signed(names).map_err(wrong)?;
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())
            .map_err(|e| TlsError { reason: format!("the new key is unusable: {e}") })?;
        Tls::of(vec![made.cert.der().clone()], key)
    }

    fn of(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Tls, TlsError> {
        let wrong = |e: rustls::Error| TlsError {
            reason: format!("the certificate and the key don't go together: {e}"),
        };
        let certificate = chain[0].clone();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(wrong)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(wrong)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Tls { acceptor: TlsAcceptor::from(Arc::new(config)), certificate })
    }

    /// BLAKE3 of the certificate, for people to compare.
    pub fn fingerprint(&self) -> String {
        blake3::hash(&self.certificate).to_hex().to_string()
    }

    pub(crate) fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_and_keys_are_read_and_have_to_match() {
        let made = || rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (one, other) = (made(), made());
        let (chain, key) = (one.cert.pem(), one.signing_key.serialize_pem());
        assert!(Tls::new(chain.as_bytes(), key.as_bytes()).is_ok());
        let reason = |chain: &str, key: &str| Tls::new(chain.as_bytes(), key.as_bytes()).unwrap_err().reason;
        assert!(reason("", &key).contains("no certificate"));
        assert!(reason(&chain, &chain).contains("no private key"));
        assert!(reason(&chain, &other.signing_key.serialize_pem()).contains("don't go together"));
        assert_eq!(Tls::self_signed(&["localhost".to_owned()]).unwrap().fingerprint().len(), 64);
    }
}
