//! In the place of `tls` where the feature is off: types without values, so that no server can have TLS.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::access::CertificateName;
use super::fair::Turn;

/// How connections are encrypted. Without the feature `tls` there is no such thing.
#[derive(Clone, Copy, Debug)]
pub enum Tls {}

impl Tls {
    pub(super) fn replace_with(&self, _other: &Self) {
        match *self {}
    }

    pub(super) const fn asks_for_certificates(&self) -> bool {
        match *self {}
    }

    pub(super) const fn required(&self) -> bool {
        match *self {}
    }
}

/// An established TLS session.
#[derive(Debug)]
pub(super) enum TlsSession {}

impl TlsSession {
    pub(super) fn accept(
        tls: &Tls,
        _socket: BorrowedFd<'_>,
        _deadline: Option<Instant>,
        _turn: &mut Turn,
    ) -> io::Result<Self> {
        match *tls {}
    }

    pub(super) fn certificate_names(&self) -> Vec<CertificateName> {
        match *self {}
    }

    pub(super) fn set_deadline(&mut self, _deadline: Option<Instant>) {
        match *self {}
    }

    pub(super) fn receive(&mut self, _socket: BorrowedFd<'_>, _room: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub(super) fn send_all(&mut self, _socket: BorrowedFd<'_>, _bytes: &[u8], _turn: &mut Turn) -> io::Result<()> {
        match *self {}
    }

    pub(super) fn close(&mut self, _socket: BorrowedFd<'_>) {
        match *self {}
    }
}
