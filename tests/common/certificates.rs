//! Certificates for TLS tests, in the ecosystem's file names.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};

/// The number of the client's certificate.
const CLIENT_SERIAL: u64 = 77;

/// A directory with an authority, a server's and a client's certificate, and in `revoked.pem` the revocation of the last.
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
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key = KeyPair::generate().unwrap();
    write("ca-cert.pem", authority.self_signed(&authority_key).unwrap().pem());
    let issuer = Issuer::new(authority, authority_key);
    for (file, name) in [("server", "localhost"), ("client", client_name)] {
        let key = KeyPair::generate().unwrap();
        let mut params = named(name);
        params.serial_number = Some(SerialNumber::from(if file == "client" { CLIENT_SERIAL } else { 1 }));
        write(&format!("{file}-cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        write(&format!("{file}-key.pem"), key.serialize_pem());
    }
    let (yesterday, in_ages) = (date_time_ymd(2020, 1, 1), date_time_ymd(2120, 1, 1));
    let client = RevokedCertParams {
        serial_number: SerialNumber::from(CLIENT_SERIAL),
        revocation_time: yesterday,
        reason_code: None,
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: yesterday,
        next_update: in_ages,
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: vec![client],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    write("revoked.pem", list.signed_by(&issuer).unwrap().pem().unwrap());
    directory
}
