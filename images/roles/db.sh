# A database server; the cluster is made when the package is installed.
# shellcheck shell=bash disable=SC2034
role_kernel=older
role_packages="postgresql"
role_units="postgresql@*-main.service"
# Reads the catalogs through and through.
role_app='runuser -u postgres -- psql -qAt -c "select count(*), sum(length(description)) from pg_description" \
    -c "select count(*), sum(length(prosrc)) from pg_proc" -c "select count(*) from pg_attribute natural join pg_class"'
