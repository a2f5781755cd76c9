# A Ruby application: it counts as started when it has answered.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="ruby ruby-sinatra puma"
role_apt_options=--no-install-recommends
role_units="vmar-app.service"

# Every library that is installed.
role_app='find /usr/lib/ruby /usr/share/rubygems-integration -type f -exec cat {} + >/dev/null'

role_configure() {
    local root=$1
    install -D -m 0644 /dev/stdin "$root/srv/app/config.ru" <<'RUBY'
require 'sinatra/base'

class App < Sinatra::Base
  get('/') { "up\n" }
end

run App
RUBY
    install -D -m 0644 /dev/stdin "$root/etc/systemd/system/vmar-app.service" <<'UNIT'
[Unit]
Description=A service in Ruby

[Service]
DynamicUser=yes
ExecStart=/usr/bin/puma -e production -b tcp://127.0.0.1:9292 /srv/app/config.ru
ExecStartPost=/usr/bin/curl -sSf --retry 200 --retry-delay 1 --retry-connrefused http://127.0.0.1:9292/
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
UNIT
    in_image systemctl enable vmar-app.service
}
