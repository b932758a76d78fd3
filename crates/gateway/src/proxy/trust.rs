//! TLS to replicas: whose certificates are believed.
//!
//! The system's authorities, as every other program on the machine does, or those of one file: replicas in a private
//! network mostly have certificates that their owner made. There is no switch to believe anyone.

use std::sync::{Arc, OnceLock};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

use crate::http::tls::TlsError;

/// Whose certificates replicas at `https://` addresses may have.
#[derive(Clone, Default)]
pub struct Trust(Option<Arc<ClientConfig>>);

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Trust(a file\'s)" } else { "Trust(the system\'s)" })
    }
}

impl Trust {
    /// The authorities (or single certificates) of a PEM text, and no others.
    ///
    /// # Errors
    /// [`TlsError`] where it holds none, or one that can't be used.
    pub fn pem(text: &[u8]) -> Result<Trust, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(text) {
            let certificate = certificate.map_err(|e| TlsError {
                reason: format!("the file of trusted certificates is no PEM: {e}"),
            })?;
            roots.add(certificate).map_err(|e| TlsError {
                reason: format!("a certificate of the file of trusted ones can\'t be used: {e}"),
            })?;
        }
        if roots.is_empty() {
            let reason = "the file of trusted certificates holds none".to_owned();
            return Err(TlsError { reason });
        }
        Ok(Trust(Some(config(roots)?)))
    }

    /// What makes connections.
    pub(crate) fn connector(&self) -> Result<TlsConnector, TlsError> {
        let config = match &self.0 {
            Some(config) => Arc::clone(config),
            None => systems()?,
        };
        Ok(TlsConnector::from(config))
    }
}

/// The system's authorities, read once.
fn systems() -> Result<Arc<ClientConfig>, TlsError> {
    static SYSTEMS: OnceLock<Result<Arc<ClientConfig>, TlsError>> = OnceLock::new();
    let read = || {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            let reason = "this machine has no certificate authorities (Debian's are in ca-certificates); install them, \
                          or name a file of trusted certificates";
            return Err(TlsError { reason: reason.to_owned() });
        }
        config(roots)
    };
    SYSTEMS.get_or_init(read).clone()
}

fn config(roots: RootCertStore) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| TlsError { reason: e.to_string() })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_trusted_certificates_must_hold_some() {
        let reason = |text: &str| Trust::pem(text.as_bytes()).map(|_| ()).unwrap_err().reason;
        assert!(reason("").contains("holds none"));
        let broken = "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
        assert!(reason(broken).contains("no PEM"), "{}", reason(broken));
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        assert!(Trust::pem(made.cert.pem().as_bytes()).is_ok());
    }
}
