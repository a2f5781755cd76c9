# An application stack as the VMAR paper loads it: a database server, and a Java application with the libraries of several
# frameworks. Neither is started at boot; the load does it. `pin=` makes images of it that differ in versions only.
# shellcheck shell=bash disable=SC2034,SC2154
role_kernel=newest
role_size=3G
role_packages="postgresql default-jre-headless ecj libtomcat10-java libspring-web-java libspring-orm-java libhibernate3-java
    libeclipselink-java libnetty-java maven gradle groovy scala clojure"
role_apt_options=--no-install-recommends

# Starts the database and asks it something that reads a whole table, then has Java read every archive of the class path,
# the run-time environment's own classes first.
role_app='
cluster=$(cd /etc/postgresql && echo */main)
systemctl start "postgresql@$(echo "$cluster" | tr / -).service"
runuser -u postgres -- psql -qAt -d bench -c "select count(*), sum(abalance), max(filler) from pgbench_accounts"
java -Xshare:auto -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmx96m -cp /srv/app ReadAll /srv/app/class-path
'

role_configure() {
    local root=$1 version
    install -D -m 0644 "$here/guest/app/ReadAll.java" "$root/srv/app/ReadAll.java"
    in_image ecj -11 -proc:none -d /srv/app /srv/app/ReadAll.java
    # Each archive once, however many links lead to it.
    in_image sh -c 'readlink -f /usr/bin/java | sed "s,/bin/java$,/lib/modules," >/srv/app/class-path &&
        find /usr/share /usr/lib -name "*.jar" -type f | LC_ALL=C sort >>/srv/app/class-path'
    # The database: about 45 MB. It is made by a server that runs here for a moment.
    version=$(basename "$root"/etc/postgresql/*)
    echo manual >"$root/etc/postgresql/$version/main/start.conf"
    install -d -o "$(in_image id -u postgres)" -g "$(in_image id -g postgres)" -m 2775 "$root/run/postgresql"
    in_image runuser -u postgres -- "/usr/lib/postgresql/$version/bin/pg_ctl" --wait --silent \
        -D "/var/lib/postgresql/$version/main" -l /tmp/postgresql.log \
        -o "-c config_file=/etc/postgresql/$version/main/postgresql.conf -c listen_addresses=" start
    in_image runuser -u postgres -- createdb bench
    in_image runuser -u postgres -- "/usr/lib/postgresql/$version/bin/pgbench" --initialize --quiet --scale=3 bench
    in_image runuser -u postgres -- psql -q -d bench -c 'vacuum freeze analyze' -c checkpoint
    in_image runuser -u postgres -- "/usr/lib/postgresql/$version/bin/pg_ctl" --wait --silent \
        -D "/var/lib/postgresql/$version/main" stop
}
