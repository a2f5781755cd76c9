# A database server some months later: packages were added, tables grew and were thinned out, logs were rotated.
# shellcheck shell=bash disable=SC2034
use_packages="git pgbouncer python3-psycopg2"

use_run() {
    runuser -u postgres -- psql --quiet --set ON_ERROR_STOP=1 <<'SQL'
CREATE DATABASE shop;
\c shop
CREATE TABLE customer (id integer PRIMARY KEY, name text, mail text, since timestamp);
CREATE TABLE item (id integer PRIMARY KEY, customer integer, what text, price numeric, at timestamp);
INSERT INTO customer SELECT i, md5(i::text), md5('m' || i) || '@mail.invalid', now() - i * interval '1 hour'
    FROM generate_series(1, 20000) i;
INSERT INTO item SELECT i, i % 20000 + 1, repeat(md5(i::text), 1 + i % 5), i % 997, now() - i * interval '1 minute'
    FROM generate_series(1, 150000) i;
CREATE INDEX item_customer ON item (customer);
CREATE INDEX item_at ON item (at);
UPDATE item SET price = price * 1.05, at = now() WHERE id % 4 = 0;
DELETE FROM item WHERE id % 7 = 0;
VACUUM ANALYZE;
INSERT INTO item SELECT i, i % 20000 + 1, 'late ' || i, 1, now() FROM generate_series(150001, 160000) i;
CHECKPOINT;
SQL
    # A nightly dump, yesterday's removed again.
    runuser -u postgres -- pg_dump --format=custom --file=/var/lib/postgresql/shop.dump shop
    runuser -u postgres -- pg_dump --file=/var/lib/postgresql/shop.sql shop
    sync
    rm /var/lib/postgresql/shop.sql
    useradd --create-home --shell /bin/bash operator1
    runuser -u operator1 -- git init --quiet /home/operator1/notes
    cp -r /etc /home/operator1/notes/etc
    systemctl restart postgresql pgbouncer
    logrotate --force /etc/logrotate.conf
    journalctl --quiet --rotate --vacuum-size=4M
    apt-get clean
    sync
}
