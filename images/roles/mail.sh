# A mail server for local delivery.
# shellcheck shell=bash disable=SC2034,SC2154
role_kernel=newest
role_packages="postfix"
case $release in
    bookworm) role_units="postfix@-.service" ;;
    *) role_units="postfix.service" ;;
esac
role_debconf="postfix postfix/main_mailer_type select Local only
postfix postfix/mailname string mail.invalid"
