//! What is on media.
