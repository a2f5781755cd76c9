# A web server.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="nginx"
role_units="nginx.service"
