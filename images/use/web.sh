# A web server after a while: a site was put there and changed, requests were logged, logs were rotated.
# shellcheck shell=bash disable=SC2034
use_packages="git php-fpm"

use_run() {
    local i round
    for round in 1 2 3; do
        for i in $(seq 200); do
            printf '<html><title>%s</title><p>%s\n' "$i" "$(head -c 6000 /dev/urandom | base64)" >"/var/www/html/$i.html"
        done
        for i in $(seq 1 $((round + 2)) 200); do
            curl -sS -o /dev/null "http://127.0.0.1/$i.html"
        done
        sync
        rm -f /var/www/html/*"$round".html
        logrotate --force /etc/logrotate.conf
    done
    useradd --create-home --shell /bin/bash operator1
    cp -r /etc /home/operator1/
    systemctl restart nginx
    journalctl --quiet --rotate --vacuum-size=4M
    apt-get clean
    sync
}
