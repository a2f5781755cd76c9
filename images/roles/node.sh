# A JavaScript application: it counts as started when it has answered.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="nodejs node-express"
role_apt_options=--no-install-recommends
role_units="vmar-app.service"

# Every module that is installed.
role_app='find /usr/share/nodejs -type f -name "*.js" -exec cat {} + >/dev/null'

role_configure() {
    local root=$1
    install -D -m 0644 /dev/stdin "$root/srv/app/app.js" <<'JS'
const express = require('express');
const app = express();
app.get('/', (request, response) => response.send('up\n'));
app.listen(3000, '127.0.0.1');
JS
    install -D -m 0644 /dev/stdin "$root/etc/systemd/system/vmar-app.service" <<'UNIT'
[Unit]
Description=A service in JavaScript

[Service]
DynamicUser=yes
ExecStart=/usr/bin/node /srv/app/app.js
ExecStartPost=/usr/bin/curl -sSf --retry 200 --retry-delay 1 --retry-connrefused http://127.0.0.1:3000/
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
UNIT
    in_image systemctl enable vmar-app.service
}
