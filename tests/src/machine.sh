# Becomes systemd, as the first process of new PID, mount, cgroup, network, IPC and host name namespaces.
#
# usage: machine.sh SHARE
# SHARE, a directory of the machine outside, is /mnt/share in here.
#
# systemd empties /tmp and /run and sets up much else when it starts. Nothing of that may reach the machine outside: what it
# writes to is private to this mount namespace, which is checked before it is started, and it finds no unit
# files but those that are written here.
set -eu
share=$1
mount --make-rprivate /

mount -t tmpfs -o mode=755 ftrun-test /mnt
mkdir /mnt/share
mount --bind "$share" /mnt/share
# Without its permissions /tmp is of no use to other users.
for dir in /run /var /etc/systemd/system /root; do mount -t tmpfs -o mode=755 ftrun-test $dir; done
for dir in /tmp /dev/shm; do mount -t tmpfs -o mode=1777 ftrun-test $dir; done
for dir in /mnt /tmp /run /var /etc/systemd/system /root /dev/shm; do
    source=$(findmnt --noheadings --output SOURCE --mountpoint $dir | tail -n 1)
    if [ "$source" != ftrun-test ]; then
        echo "$dir is not private: $source"
        exit 1
    fi
done
mkdir -p /var/lib /var/log /run/lock

mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# The console of the machine outside is not for us.
: > /mnt/share/console
mount --bind /mnt/share/console /dev/console
ip link set lo up

for target in sysinit basic network sockets multi-user shutdown; do
    printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' $target > /etc/systemd/system/$target.target
done
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin container=ftrun-test \
    SYSTEMD_UNIT_PATH=/etc/systemd/system SYSTEMD_GENERATOR_PATH=/mnt/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/mnt/none \
    /lib/systemd/systemd --unit=basic.target --log-target=console --show-status=no
