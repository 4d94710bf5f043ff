//! AES-XTS over runs of data units.
