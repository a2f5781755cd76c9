# A mail server for local delivery.
# shellcheck shell=bash disable=SC2034
role_kernel=newest
role_packages="postfix"
role_units="postfix@-.service"
role_debconf="postfix postfix/main_mailer_type select Local only
postfix postfix/mailname string mail.invalid"
