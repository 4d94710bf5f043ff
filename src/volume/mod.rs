//! The decrypted view of an unlocked namespace.
