# The other database server; its tables are made when the package is installed.
# shellcheck shell=bash disable=SC2034
role_kernel=older
role_packages="mariadb-server"
role_units="mariadb.service"
# Reads its own tables.
role_app='mariadb-check --check --databases mysql sys'
