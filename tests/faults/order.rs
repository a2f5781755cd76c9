//! Single orders of events, held where they matter.
