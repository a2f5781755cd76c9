//! The engine that waits: io_uring, one ring a queue thread. (being built)
