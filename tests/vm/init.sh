#!/bin/busybox sh
# First process of the virtual machine of `cargo xtask vm`: runs self-checking programs under ftrun, kills them,
# and prints a line `VM ...` for each thing that was found out.
/bin/busybox --install -s /bin
export PATH=/bin FTRUN_STATE_DIR=/tmp/state
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
ip link set lo up
ftrun doctor
for program in $(cat /programs); do
    mkdir "/tmp/$program"
    cd "/tmp/$program" || continue
    ftrun run --name "$program" --checkpoint-every 300ms -- "$program" > out 2> err &
    ftrun_pid=$!
    for kill in 1 2 3 4 5 6; do
        sleep 1
        kill -9 "$(ftrun status "$program" --json | sed -n 's/^  "pid": \([0-9]*\),/\1/p')"
    done
    sleep 1
    ftrun checkpoint "$program" > /dev/null
    status=$(ftrun status "$program" --json)
    field() { echo "$status" | sed -n "s/^  \"$1\": \"*\([^\",]*\).*/\1/p" | head -n 1; }
    backend=$(field dirty_backend) recoveries=$(field recoveries)
    ftrun verify "$program"
    verified=$?
    touch stop
    wait $ftrun_pid
    code=$?
    rounds=$(sed -n 's/^ok //p' out)
    distinct=$(grep '^round' out | sort -u | wc -l)
    cat err
    echo "VM $program backend $backend recoveries $recoveries verify $verified exit $code rounds $rounds distinct $distinct"
done
echo "VM end"
poweroff -f
