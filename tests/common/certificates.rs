//! Certificates for TLS tests, in the ecosystem's file names.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

/// A directory with an authority, a server's and a client's certificate.
pub fn certificates(client_name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
    let named = |name: &str| {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
        params
    };
    let mut authority = named("test authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    write("ca-cert.pem", authority.self_signed(&authority_key).unwrap().pem());
    let issuer = Issuer::new(authority, authority_key);
    for (file, name) in [("server", "localhost"), ("client", client_name)] {
        let key = KeyPair::generate().unwrap();
        write(&format!("{file}-cert.pem"), named(name).signed_by(&key, &issuer).unwrap().pem());
        write(&format!("{file}-key.pem"), key.serialize_pem());
    }
    directory
}
