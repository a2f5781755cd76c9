# A database server; the cluster is made when the package is installed.
# shellcheck shell=bash disable=SC2034
role_kernel=older
role_packages="postgresql"
role_units="postgresql@*-main.service"
