//! Mapping, persistence and probing of a backing.
