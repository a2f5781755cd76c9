# Sourced: apt with a configuration, lists, cache and package state of its own, for packages that the machine's apt does
# not know and that must not be installed on it. Nothing outside its folder is written.
# shellcheck shell=bash

# private_apt_setup FOLDER TYPE SUITE...: makes it ready; TYPE is deb or deb-src. Its sources are those that the machine
# has of Debian 12, and SUITE... from the same mirror. Sets apt_options, for apt-get and apt-cache.
private_apt_setup() {
    local folder=$1 type=$2 mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg signed='' suite lists
    shift 2
    mkdir -p "$folder"/{lists/partial,cache/archives/partial,empty}
    # Without its own lists, apt does not say which of its sources are Debian's.
    lists=$(debian_targets)
    if [ -z "$lists" ] && [ "$(id -u)" -eq 0 ]; then
        apt-get update >"$folder/update.log" 2>&1 || die "apt-get update failed: see $folder/update.log"
        lists=$(debian_targets)
    fi
    mirror=$(awk '$2 == "bookworm" { print $1; exit }' <<<"$lists")
    [ -n "$mirror" ] || die "apt of this machine has no source of Debian 12: run 'apt-get update'"
    [ ! -e "$keyring" ] || signed="[signed-by=$keyring] "
    {
        awk -v type="$type" -v signed="$signed" '{ print type " " signed $1 " " $2 " main" }' <<<"$lists"
        for suite in "$@"; do
            echo "$type $signed$mirror $suite main"
        done
    } | sort -u >"$folder/sources.list"
    # What is installed, but no part of QEMU and no firmware: those shall come whole, whatever the machine has.
    # Nothing is installed here, so that a download has every dependency and no package of the machine is in the way.
    : >"$folder/status"
    apt_options=(-qq
        -o "Dir::Etc::sourcelist=$folder/sources.list" -o "Dir::Etc::sourceparts=$folder/empty"
        -o "Dir::State=$folder" -o "Dir::State::lists=$folder/lists/" -o "Dir::State::status=$folder/status"
        -o "Dir::State::extended_states=$folder/extended_states"
        -o "Dir::Cache=$folder/cache" -o "Dir::Cache::archives=$folder/cache/archives/"
        -o Debug::NoLocking=1 -o APT::Sandbox::User= -o Acquire::Retries=3)
    apt-get "${apt_options[@]}" update >"$folder/update.log" 2>&1 || die "apt-get update failed: see $folder/update.log"
}

# MIRROR SUITE of each of Debian's own package lists.
debian_targets() {
    # shellcheck disable=SC2016 # apt's own variables
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
        awk '$3 == "main" && $2 ~ /^bookworm/ { print $1, $2 }' | sort -u
}
