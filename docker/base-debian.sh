#!/bin/sh
# base-debian.sh OUT.tar: the root file system of a sandbox image, out of Debian packages and nothing else.
#
# No registry and no Docker are needed, only mmdebstrap and a Debian mirror; nor is root, where the kernel
# grants user namespaces. The same packages give the same bytes. `rlm docker build --from debian` runs this and
# loads the result; by hand it is `docker import OUT.tar`, whose image has no settings and a new id every time.
#
#   SUITE              a Debian release; the one of this machine, or bookworm
#   MIRROR             where its packages are; what mmdebstrap takes by itself
#   TARGET             plain, or science: numpy, pandas, scipy, scikit-learn, sympy, networkx
#   INCLUDE            more Debian packages, with commas between; their maintainer scripts do not run
#   PACKAGES           a directory whose contents join the image's Python packages (see pip install --target)
#   SOURCE_DATE_EPOCH  the newest time a file may have; 1980, the first that zip files can tell
set -eu

fail() {
    echo "base-debian.sh: $1" >&2
    exit "${2:-1}"
}

# --- run by mmdebstrap, with the root file system ---------------------------------------------

# Debian 12 packages unpack into /bin and /lib, later ones into /usr/bin and /usr/lib: with links both work.
merge() {
    for name in bin lib lib64 sbin; do
        mkdir -p "$1/usr/$name"
        ln -s "usr/$name" "$1/$name"
    done
}

# mmdebstrap only unpacks: what maintainer scripts would have done, and what nobody needs, is done here.
finish() {
    cd "$1"
    remove
    accounts
    certificates
    commands
    libraries
    version=$(inside python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    packages "usr/local/lib/python$version/dist-packages"
    bytecode "/usr/lib/python$version"
}

# What Python would compile for itself here is checked against times, and times are about to change.
inside() {
    env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C.UTF-8 PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 chroot . "$@"
}

remove() {
    rm -rf etc/apt etc/cron.* etc/dpkg etc/init.d etc/kernel etc/logrotate.d etc/perl etc/systemd
    rm -rf usr/bin/*dpkg* usr/sbin/*dpkg* usr/share/dpkg usr/lib/dpkg usr/libexec/dpkg usr/lib/systemd
    rm -rf usr/bin/perl* usr/lib/*/perl* usr/share/perl* usr/share/debconf usr/lib/*/gconv usr/lib/valgrind
    for name in applications bash-completion binfmts bug doc doc-base info initramfs-tools lintian locale man \
        menu pixmaps polkit-1 zoneinfo/posix zoneinfo/right; do
        rm -rf "usr/share/$name"
    done
    # numerical packages depend on compilers, which fill most of the image that has them
    rm -rf usr/bin/*-linux-gnu-* usr/include usr/lib/gcc usr/lib/python3*/config-* usr/lib/python3/dist-packages/pythran
    rm -rf usr/lib/*/*.a usr/lib/*/*/*.a usr/lib/*/lib[alt]san.so* usr/lib/*/libubsan.so* usr/lib/*/libperl.so*
    # and tests much of the rest; by name, since some packages import theirs
    for name in networkx pandas scipy sklearn sympy; do
        [ ! -d "usr/lib/python3/dist-packages/$name" ] ||
            find "usr/lib/python3/dist-packages/$name" -depth -type d -name tests -exec rm -rf {} +
    done
    rm -rf var/cache var/log var/lib/apt var/lib/dpkg tmp var/tmp
    mkdir -p dev home proc root run sys tmp var/tmp
    chmod 1777 tmp var/tmp
}

accounts() {
    printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534:nobody:/tmp:/bin/sh >etc/passwd
    printf '%s\n' root:x:0: nogroup:x:65534: >etc/group
    printf '%s\n' 'passwd: files' 'group: files' 'hosts: files dns' >etc/nsswitch.conf
    # mmdebstrap leaves this machine's; an engine gives each container its own
    for name in hostname resolv.conf; do
        rm -f "etc/$name"
        : >"etc/$name"
    done
}

certificates() {
    mkdir -p etc/ssl/certs
    cat usr/share/ca-certificates/*/*.crt >etc/ssl/certs/ca-certificates.crt
    ln -sf /etc/ssl/certs/ca-certificates.crt usr/lib/ssl/cert.pem
    rm -rf usr/share/ca-certificates
}

# The tools of busybox, where there is no real one.
commands() {
    inside /bin/busybox --list | while read -r name; do
        [ -e "usr/bin/$name" ] || [ -L "usr/bin/$name" ] || ln -s busybox "usr/bin/$name"
    done
    ln -sf python3 usr/bin/python
}

# Debian has several numerical libraries, and a maintainer script to link the one to use.
libraries() {
    for path in usr/lib/*/openblas-pthread/lib*.so.[0-9]; do
        [ ! -e "$path" ] || ln -sf "openblas-pthread/${path##*/}" "${path%/*/*}/${path##*/}"
    done
}

packages() {
    mkdir -p "$1"
    [ -z "$PACKAGES" ] || cp -R "$PACKAGES/." "$1"
    chmod -R u=rwX,go=rX "$1"
}

# Without byte code every start in a read-only image compiles what it imports: half a second. One process for
# each part, in order and with one hash seed: the same bytes every time.
bytecode() {
    find usr -name __pycache__ -prune -exec rm -rf {} +
    compile -l "$1" &
    first=$!
    compile "$1"/*/ /usr/lib/python3/dist-packages "/usr/local/lib/${1##*/}/dist-packages"
    wait "$first"
    [ -n "$(find "${1#/}/__pycache__" -name 'os.*.pyc')" ] || fail "the standard library does not compile"
}

# A file that does not compile is no failure: packages carry templates, and code for other versions.
compile() {
    inside python3 -S -m compileall -f -q --invalidation-mode unchecked-hash "$@" >/dev/null || true
}

umask 022
export LC_ALL=C
case ${1:-} in
--merge)
    merge "$2"
    exit
    ;;
--finish)
    finish "$2"
    exit
    ;;
esac

# --- run by people ----------------------------------------------------------------------------

[ $# -eq 1 ] || fail "usage: base-debian.sh OUT.tar" 64
[ "$(uname -s)" = Linux ] || fail "Debian packages can be unpacked on Linux only, and this is $(uname -s)" 69
command -v mmdebstrap >/dev/null ||
    fail "mmdebstrap is not installed; get it with: sudo apt-get install mmdebstrap debian-archive-keyring uidmap" 69

include=python3,busybox-static,ca-certificates,media-types,netbase,tzdata
case ${TARGET:-plain} in
plain) ;;
science)
    include=$include,python3-numpy,python3-pandas,python3-scipy,python3-sklearn,python3-sympy,python3-networkx
    include=$include,libopenblas0-pthread # several times as fast as what numpy brings by itself
    ;;
*) fail "TARGET is plain or science, not $TARGET" 64 ;;
esac
if [ -n "${PACKAGES:-}" ]; then
    PACKAGES=$(cd "$PACKAGES" && pwd) || fail "PACKAGES is not a directory that can be read" 66
fi
# shellcheck source=/dev/null
suite=${SUITE:-$(. /etc/os-release && [ "$ID" = debian ] && echo "${VERSION_CODENAME:-}" || true)}

RECIPE=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
export RECIPE PACKAGES="${PACKAGES:-}" SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-315532800}"

trap 'rm -f "$1.partial"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# shellcheck disable=SC2016,SC2086 # $RECIPE and $1 are for mmdebstrap's shell; no MIRROR is no argument
mmdebstrap --quiet --mode=auto --format=tar --variant=extract --include="$include${INCLUDE:+,$INCLUDE}" \
    --setup-hook='sh "$RECIPE" --merge "$1"' --extract-hook='sh "$RECIPE" --finish "$1"' \
    --skip=cleanup,output/dev "${suite:-bookworm}" "$1.partial" ${MIRROR:-} || {
    code=$?
    [ "$(id -u)" = 0 ] || echo "(without root: is uidmap installed, and are you in /etc/subuid and /etc/subgid?)" >&2
    exit "$code"
}
mv "$1.partial" "$1"
