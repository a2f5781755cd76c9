# A Java runtime; its service starts the virtual machine once.
# shellcheck shell=bash disable=SC2034
role_kernel=older
role_packages="default-jre-headless"
role_units="vmar-java.service"

# The classes of the run-time environment, and a second virtual machine that does without the shared archive of them.
role_app='cat "$(readlink -f /usr/bin/java | sed s,/bin/java$,/lib/modules,)" >/dev/null
java -Xshare:off -XX:TieredStopAtLevel=1 -version'

role_configure() {
    local root=$1
    install -D -m 0644 /dev/stdin "$root/etc/systemd/system/vmar-java.service" <<'UNIT'
[Unit]
Description=Start the Java virtual machine once

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/java -Xshare:auto -version
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
UNIT
    in_image systemctl enable vmar-java.service
}
