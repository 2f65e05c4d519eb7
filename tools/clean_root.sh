#!/usr/bin/env bash
# Run the Dockerfile's steps in a clean root, where no Docker daemon runs:
#   [MIRROR=URL] [BIND='PATH ...'] tools/clean_root.sh FOLDER [COMMAND ...]
# The root is made in FOLDER with debootstrap, from MIRROR, unless it is there;
# the committed files are copied into it. BIND names what of this machine it
# sees, such as /etc/pip.conf or a folder of wheels. At the end COMMAND is run
# there, by default `mmkd --help`. Needs root, on Debian or Ubuntu.
set -euo pipefail
if [ $# = 0 ]; then sed -n '2,8s/^# //p' "$0"; exit 2; fi
if [ -z "${IN_NAMESPACE:-}" ]; then
    # What is mounted below goes with this script.
    IN_NAMESPACE=1 exec unshare --mount "$0" "$@"
fi
root=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."

if [ ! -e "$root/etc/debian_version" ]; then
    suite=$(sed -n 's/^FROM debian:\(.*\)-slim$/\1/p' Dockerfile)
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" \
        ${MIRROR:+"$MIRROR"}
fi
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for path in /etc/resolv.conf /etc/hosts ${BIND:-}; do
    if [ -d "$path" ]; then
        mkdir -p "$root$path"
    else
        mkdir -p "$root${path%/*}" && touch "$root$path"
    fi
    mount --bind "$path" "$root$path"
done

settings=(HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin) folder=/
run() {
    printf '[clean_root] %s\n' "$*"
    chroot "$root" env -i "${settings[@]}" sh -c "cd $folder && $*"
}
while read -r verb rest; do
    case $verb in
    RUN) run "$rest" </dev/null ;;
    WORKDIR) folder=$rest && mkdir -p "$root$folder" ;;
    COPY) git archive HEAD | tar -xC "$root$folder" ;;
    ENV)
        path=${settings[1]#PATH=}
        read -ra added <<<"${rest/\$PATH/$path}"
        settings+=("${added[@]}")
        ;;
    esac
done < <(sed -e ':again' -e '/\\$/{N;s/\\\n//;b again}' Dockerfile)
run "${*:-mmkd --help}"
