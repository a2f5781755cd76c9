# An in-memory cache.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="redis-server"
role_units="redis-server.service"
