//! Large aligned memory, on huge pages where the system has them.
