//! Who a client is, and which clients an export admits.
//!
//! Identities are compared whole, never by prefix. An empty rule admits everybody who could connect at all: the
//! socket's mode, the listen address and the server's TLS mode are decided elsewhere.

/// What is known about the other end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// Unix peer credentials: user and group.
    pub unix: Option<UnixPeer>,
    /// Names in the verified TLS client certificate: the subject's common name and the alternative names.
    pub certificate_names: Vec<String>,
}

/// User and group of a process at the other end of a Unix socket, as the kernel recorded them at connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnixPeer {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
}

/// The clients that may use an export. Without any entry every client may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Users that may come over a Unix socket.
    pub uids: Vec<u32>,
    /// Groups that may come over a Unix socket.
    pub gids: Vec<u32>,
    /// Names, one of which the TLS client certificate must carry (ASCII case is ignored).
    pub certificate_names: Vec<String>,
}

impl Allowed {
    /// Whether `peer` may use the export: no rule at all, or one that matches.
    pub fn admits(&self, peer: &Peer) -> bool {
        let open = self.uids.is_empty() && self.gids.is_empty() && self.certificate_names.is_empty();
        let by_unix = peer.unix.is_some_and(|unix| self.uids.contains(&unix.uid) || self.gids.contains(&unix.gid));
        let by_name = self
            .certificate_names
            .iter()
            .any(|allowed| peer.certificate_names.iter().any(|name| name.eq_ignore_ascii_case(allowed)));
        open || by_unix || by_name
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
    fn names_are_compared_whole() {
        let allowed = Allowed { certificate_names: vec!["host1".into()], ..Allowed::default() };
        for (name, admitted) in [("host1", true), ("HOST1", true), ("host10", false), ("host", false), ("", false)] {
            let peer = Peer { certificate_names: vec![name.into()], ..Peer::default() };
            assert_eq!(allowed.admits(&peer), admitted, "{name}");
        }
        assert!(!allowed.admits(&Peer::default()));
    }

    #[test]
    fn users_and_groups_are_separate_numbers() {
        let allowed = Allowed { uids: vec![7], gids: vec![8], ..Allowed::default() };
        for (uid, gid, admitted) in [(7, 1, true), (1, 8, true), (8, 7, false), (70, 80, false)] {
            let peer = Peer { unix: Some(UnixPeer { uid, gid }), ..Peer::default() };
            assert_eq!(allowed.admits(&peer), admitted, "{uid}:{gid}");
        }
    }
}
