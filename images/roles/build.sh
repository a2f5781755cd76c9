# A machine that compiles: C, with make.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="gcc make libc6-dev"
role_apt_options=--no-install-recommends
