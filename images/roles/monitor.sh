# Monitoring: Prometheus, and the exporter that every machine runs. Big static binaries.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="prometheus prometheus-node-exporter"
role_apt_options=--no-install-recommends
role_units="prometheus.service prometheus-node-exporter.service"
