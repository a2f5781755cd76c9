//! Tables for humans, JSON for scripts, and progress bars. (being built)
