# PHP pages below Apache, with what such applications usually ask for.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="apache2 libapache2-mod-php php-cli php-curl php-gd php-mbstring php-mysql php-xml"
role_units="apache2.service"
