//! HTTP client with a short timeout for connecting and a long one for reading, and with pip's certificates and proxy.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::pip_config;

/// Creates a client with the connection timeout `connect`. The proxy comes from pip's `proxy`, else from the usual
/// environment variables.
pub(super) fn agent(connect: Duration) -> Result<Agent> {
    let mut config = Agent::config_builder()
        .user_agent(concat!("medqa/", env!("CARGO_PKG_VERSION")))
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_resolve(Some(connect))
        .timeout_connect(Some(connect))
        .timeout_recv_response(Some(Duration::from_secs(30).max(connect)))
        .timeout_per_read(Some(Duration::from_secs(60)));
    if let Some(roots) = custom_roots()? {
        config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
    }
    if let Some(proxy) = pip_config::option("proxy") {
        let proxy = ureq::Proxy::new(&proxy).with_context(|| format!("pip's `proxy` is not a proxy URL: {proxy}"))?;
        config = config.proxy(Some(proxy));
    }
    Ok(config.build().new_agent())
}

/// Returns the certificates that pip's `cert` or one of the usual environment variables names; without any, Mozilla's
/// list is used.
fn custom_roots() -> Result<Option<RootCerts>> {
    let variables = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"];
    let named = pip_config::option("cert")
        .map(|path| ("pip's `cert`", path))
        .or_else(|| variables.iter().find_map(|name| pip_config::env_var(name).map(|path| (*name, path))));
    named.map(|(origin, path)| read_roots(Path::new(&path)).with_context(|| format!("{origin} = {path}"))).transpose()
}

fn read_roots(path: &Path) -> Result<RootCerts> {
    let mut pem = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            pem.extend(std::fs::read(entry?.path()).unwrap_or_default());
            pem.push(b'\n');
        }
    } else {
        pem = std::fs::read(path).context("the certificates cannot be read")?;
    }
    // Damaged items and items other than certificates are skipped.
    let certificates: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        bail!("expected certificates in PEM form, found none");
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

/// Describes an HTTP error for the user.
pub(super) fn describe_error(url: &str, error: &ureq::Error) -> String {
    match error {
        ureq::Error::StatusCode(code) => format!("{url}: the server answered {code}"),
        ureq::Error::HostNotFound => format!("{url}: the host name cannot be resolved"),
        ureq::Error::Timeout(_) => format!("{url}: no answer in time ({error})"),
        error => format!("{url}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_need_a_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        assert!(read_roots(&file).is_err());
        std::fs::write(&file, "nothing here").unwrap();
        assert!(format!("{:#}", read_roots(&file).unwrap_err()).contains("PEM"));
        assert!(read_roots(folder.path()).is_err());
        std::fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        assert!(read_roots(&file).is_ok());
        assert!(read_roots(folder.path()).is_ok());
    }
}
