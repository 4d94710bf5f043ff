//! Who a client is, and which clients an export admits.
//!
//! Identities are compared whole, never by prefix, and only with rules of their own kind. An empty rule admits everybody who
//! could connect at all: the socket's mode, the listen address and the server's TLS mode are decided elsewhere.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// What is known about the other end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// Unix peer credentials: user and groups.
    pub unix: Option<UnixPeer>,
    /// Context number of the virtual machine, over vsock.
    pub cid: Option<u32>,
    /// Internet address and port.
    pub address: Option<std::net::SocketAddr>,
    /// Names in the verified TLS client certificate: the subject's common name and the alternative names.
    pub certificate_names: Vec<CertificateName>,
}

/// Who counts as one client, however many connections it has: whoever shows a certificate with the same names, the same user of
/// a Unix socket, the same virtual machine, or the same internet address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Identity {
    /// Names of a verified certificate, as texts in order. A renewed one has the same.
    Certificate(Vec<String>),
    /// A user.
    User(u32),
    /// A virtual machine.
    Machine(u32),
    /// An address.
    Address(IpAddr),
    /// Of whom nothing is known.
    Nobody,
}

impl Peer {
    /// Who it counts as.
    pub(super) fn identity(&self) -> Identity {
        if !self.certificate_names.is_empty() {
            let mut names: Vec<_> = self.certificate_names.iter().map(CertificateName::to_string).collect();
            names.sort_unstable();
            return Identity::Certificate(names);
        }
        match (&self.unix, self.cid, self.address) {
            (Some(unix), ..) => Identity::User(unix.uid),
            (None, Some(cid), _) => Identity::Machine(cid),
            (None, None, Some(address)) => Identity::Address(address.ip().to_canonical()),
            (None, None, None) => Identity::Nobody,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.unix, self.cid, self.address) {
            (Some(unix), ..) => write!(f, "uid {} gid {} pid {}", unix.uid, unix.gid, unix.pid)?,
            (None, Some(cid), _) => write!(f, "vsock {cid}")?,
            (None, None, Some(address)) => write!(f, "{address}")?,
            (None, None, None) => f.write_str("unknown")?,
        }
        // What a certificate says is whoever's who had it signed.
        self.certificate_names.iter().try_for_each(|name| write!(f, " {}", name.to_string().escape_debug()))
    }
}

/// User and groups of a process at the other end of a Unix socket, as the kernel recorded them at connect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixPeer {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Process, for logs: another one may have its number by now.
    pub pid: i32,
}

/// A name in a certificate. In rules and in texts it is `KIND:NAME`, such as `dns:host.example`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateName {
    /// The subject's common name (`cn:`).
    Common(String),
    /// A host (`dns:`).
    Dns(String),
    /// A mailbox (`email:`).
    Email(String),
    /// A resource (`uri:`).
    Uri(String),
}

/// Why a text is no [`CertificateName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} does not say what kind of name it is: write cn:{0}, dns:{0}, email:{0} or uri:{0}")]
pub struct NoCertificateName(String);

impl FromStr for CertificateName {
    type Err = NoCertificateName;

    fn from_str(text: &str) -> Result<Self, NoCertificateName> {
        let (kind, name) = text.split_once(':').filter(|(_, name)| !name.is_empty()).unwrap_or(("", text));
        let name = name.to_owned();
        match kind {
            "cn" => Ok(Self::Common(name)),
            "dns" => Ok(Self::Dns(name)),
            "email" => Ok(Self::Email(name)),
            "uri" => Ok(Self::Uri(name)),
            _ => Err(NoCertificateName(text.to_owned())),
        }
    }
}

impl fmt::Display for CertificateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Common(name) => write!(f, "cn:{name}"),
            Self::Dns(name) => write!(f, "dns:{name}"),
            Self::Email(name) => write!(f, "email:{name}"),
            Self::Uri(name) => write!(f, "uri:{name}"),
        }
    }
}

impl CertificateName {
    /// Whether both are the same name of the same kind. ASCII case is ignored where the kind ignores it.
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Common(one), Self::Common(two)) | (Self::Dns(one), Self::Dns(two)) => one.eq_ignore_ascii_case(two),
            (Self::Email(one), Self::Email(two)) => match (one.rsplit_once('@'), two.rsplit_once('@')) {
                (Some((user, host)), Some((user_two, host_two))) => {
                    user == user_two && host.eq_ignore_ascii_case(host_two)
                }
                _ => one == two,
            },
            (Self::Uri(one), Self::Uri(two)) => one == two,
            _ => false,
        }
    }
}

/// Internet addresses that share their first bits. In rules and in texts it is an address, or `ADDRESS/BITS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    first: IpAddr,
    bits: u8,
}

/// Why a text is no [`AddressRange`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no address such as 10.0.0.7, and no range such as 10.0.0.0/24 or fd00::/8 (with zeroes behind its bits)"
)]
pub struct NoAddressRange(String);

impl AddressRange {
    /// The bits of an address that count, and which kind of address it is.
    fn prefix(address: IpAddr, bits: u8) -> (bool, u128) {
        let (number, width) = match address {
            IpAddr::V4(address) => (u128::from(u32::from(address)), 32),
            IpAddr::V6(address) => (u128::from(address), 128),
        };
        let behind = u32::from(width - bits.min(width));
        (address.is_ipv4(), number.checked_shr(behind).unwrap_or(0))
    }

    /// Whether `address` is one of them. An IPv4 address that came over IPv6 is that IPv4 address.
    fn contains(&self, address: IpAddr) -> bool {
        Self::prefix(address.to_canonical(), self.bits) == Self::prefix(self.first, self.bits)
    }
}

impl FromStr for AddressRange {
    type Err = NoAddressRange;

    fn from_str(text: &str) -> Result<Self, NoAddressRange> {
        let none = || NoAddressRange(text.to_owned());
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let first = address.parse::<IpAddr>().map_err(|_| none())?;
        let width = if first.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(width), |bits| bits.parse().map_err(|_| none()))?;
        let range = Self { first, bits };
        // Whoever writes 10.0.0.7/8 may have meant the one or the other.
        let (_, prefix) = Self::prefix(first, bits);
        let (_, whole) = Self::prefix(first, width);
        let is_first = prefix.checked_shl(u32::from(width.saturating_sub(bits))).unwrap_or(0) == whole;
        if bits <= width && is_first { Ok(range) } else { Err(none()) }
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

/// The clients that may use an export. Without any entry every client may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Users that may come over a Unix socket.
    pub uids: Vec<u32>,
    /// Groups that may come over a Unix socket, supplementary ones included.
    pub gids: Vec<u32>,
    /// Virtual machines that may come over vsock, by context number.
    pub cids: Vec<u32>,
    /// Addresses that may come over TCP. Whoever is on the way can take one: certificates are safer.
    pub addresses: Vec<AddressRange>,
    /// Names, one of which the TLS client certificate must carry.
    pub certificate_names: Vec<CertificateName>,
}

impl Allowed {
    /// Whether `peer` may use the export: no rule at all, or one that matches.
    pub fn admits(&self, peer: &Peer) -> bool {
        let by_unix = peer.unix.as_ref().is_some_and(|unix| {
            let groups = || unix.groups.iter().chain([&unix.gid]);
            self.uids.contains(&unix.uid) || groups().any(|gid| self.gids.contains(gid))
        });
        let by_cid = peer.cid.is_some_and(|cid| self.cids.contains(&cid));
        let by_address = peer.address.is_some_and(|at| self.addresses.iter().any(|range| range.contains(at.ip())));
        let carried = |allowed: &CertificateName| peer.certificate_names.iter().any(|name| name.is(allowed));
        self.is_open() || by_unix || by_cid || by_address || self.certificate_names.iter().any(carried)
    }

    /// Whether there is no rule.
    pub fn is_open(&self) -> bool {
        let numbers = self.uids.is_empty() && self.gids.is_empty() && self.cids.is_empty();
        numbers && self.addresses.is_empty() && self.certificate_names.is_empty()
    }

    /// Whether a client that is refused now could be admitted by its TLS certificate.
    pub fn names_certificates(&self) -> bool {
        !self.certificate_names.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_rules_everybody_is_admitted() {
        assert!(Allowed::default().admits(&Peer::default()));
    }

    #[test]
    fn names_are_compared_whole_and_with_their_own_kind() {
        let rule = |text: &str| Allowed { certificate_names: vec![text.parse().unwrap()], ..Allowed::default() };
        for (allowed, name, admitted) in [
            ("dns:host1", "dns:host1", true),
            ("dns:host1", "dns:HOST1", true),
            ("dns:host1", "dns:host10", false),
            ("dns:host1", "dns:host", false),
            ("dns:host1", "cn:host1", false),
            ("dns:host1", "email:host1", false),
            ("dns:host1", "uri:host1", false),
            ("cn:host1", "cn:Host1", true),
            ("cn:host1", "dns:host1", false),
            ("email:Me@example.org", "email:Me@EXAMPLE.org", true),
            ("email:Me@example.org", "email:me@example.org", false),
            ("uri:spiffe://a/b", "uri:spiffe://a/b", true),
            ("uri:spiffe://a/b", "uri:spiffe://a/B", false),
        ] {
            let peer = Peer { certificate_names: vec![name.parse().unwrap()], ..Peer::default() };
            assert_eq!(rule(allowed).admits(&peer), admitted, "{name} by {allowed}");
        }
        assert!(!rule("dns:host1").admits(&Peer::default()));
    }

    #[test]
    fn a_name_without_its_kind_is_refused() {
        for text in ["host1", "dns:", ":host1", "ip:1.2.3.4", ""] {
            let error = text.parse::<CertificateName>().unwrap_err().to_string();
            assert!(error.contains("write cn:") && error.contains("dns:"), "{error}");
        }
        assert_eq!("dns:host1".parse::<CertificateName>().unwrap().to_string(), "dns:host1");
    }

    #[test]
    fn a_client_is_its_certificate_its_user_its_machine_or_its_address() {
        let name = |text: &str| text.parse::<CertificateName>().unwrap();
        let unix = |uid, pid| Some(UnixPeer { uid, gid: 1, groups: vec![], pid });
        let over_tcp = |address: &str| Peer { address: Some(address.parse().unwrap()), ..Peer::default() };
        let one = Peer { unix: unix(7, 1), ..Peer::default() };
        assert_eq!(one.identity(), Peer { unix: unix(7, 2), ..Peer::default() }.identity());
        assert_ne!(one.identity(), Peer { unix: unix(8, 1), ..Peer::default() }.identity());
        assert_eq!(over_tcp("10.0.0.1:1").identity(), over_tcp("[::ffff:10.0.0.1]:2").identity());
        assert_ne!(over_tcp("10.0.0.1:1").identity(), over_tcp("10.0.0.2:1").identity());
        let certified = |peer: Peer, names: &[&str]| {
            let certificate_names = names.iter().map(|text| name(text)).collect();
            Peer { certificate_names, ..peer }.identity()
        };
        let (here, there) = (over_tcp("10.0.0.1:1"), over_tcp("10.0.0.2:1"));
        assert_eq!(certified(here.clone(), &["cn:a", "dns:a"]), certified(there, &["dns:a", "cn:a"]));
        assert_ne!(certified(here.clone(), &["cn:a"]), certified(here, &["dns:a"]));
        assert_ne!(Peer { cid: Some(7), ..Peer::default() }.identity(), one.identity());
    }

    #[test]
    fn addresses_are_in_ranges_of_their_own_kind() {
        for (rule, address, admitted) in [
            ("10.0.0.7", "10.0.0.7:1", true),
            ("10.0.0.7", "10.0.0.8:1", false),
            ("10.0.0.7", "[::ffff:10.0.0.7]:1", true),
            ("10.0.0.0/24", "10.0.0.255:1", true),
            ("10.0.0.0/24", "10.0.1.0:1", false),
            ("0.0.0.0/0", "1.2.3.4:1", true),
            ("0.0.0.0/0", "[::1]:1", false),
            ("::/0", "[fd00::1]:1", true),
            ("::/0", "1.2.3.4:1", false),
            ("fd00::/8", "[fdff::1]:1", true),
            ("fd00::/8", "[fe00::1]:1", false),
        ] {
            let allowed = Allowed { addresses: vec![rule.parse().unwrap()], ..Allowed::default() };
            let peer = Peer { address: Some(address.parse().unwrap()), ..Peer::default() };
            assert_eq!(allowed.admits(&peer), admitted, "{address} by {rule}");
            assert!(!allowed.admits(&Peer::default()) && !allowed.is_open());
        }
        for text in
            ["10.0.0", "10.0.0.7/8", "10.0.0.0/33", "::/129", "fd00::1/8", "host", "10.0.0.0/", "/8", "", "1.2.3.4/0"]
        {
            assert!(text.parse::<AddressRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn users_groups_and_machines_are_separate_numbers() {
        let allowed = Allowed { uids: vec![7], gids: vec![8], cids: vec![9], ..Allowed::default() };
        for (uid, gid, group, admitted) in
            [(7, 1, 1, true), (1, 8, 1, true), (1, 1, 8, true), (8, 7, 7, false), (9, 9, 9, false), (70, 80, 80, false)]
        {
            let unix = UnixPeer { uid, gid, groups: vec![3, group], pid: 1 };
            let peer = Peer { unix: Some(unix), ..Peer::default() };
            assert_eq!(allowed.admits(&peer), admitted, "{uid}:{gid},{group}");
        }
        for (cid, admitted) in [(9, true), (7, false), (8, false)] {
            assert_eq!(allowed.admits(&Peer { cid: Some(cid), ..Peer::default() }), admitted, "{cid}");
        }
    }
}
