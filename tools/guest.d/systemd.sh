# The units of tools/systemd under a real systemd, which is the first process by now: socket activation, the notification
# that the service is ready, the key as a credential, the sandbox, the restart after a crash, the end.
. /scenarios/lib.sh
mkdir -p /mnt/fs /etc/daxcrypt
mark
systemd-analyze verify --man=no /etc/systemd/system/daxcrypt@.service /etc/systemd/system/daxcrypt@.socket >/run/verify 2>&1 || fail "systemd-analyze verify: $(head -n 1 /run/verify)"
[ ! -s /run/verify ] || fail "systemd-analyze verify: $(head -n 1 /run/verify)"

key=/etc/daxcrypt/test.key
(umask 077; head -c 64 /dev/urandom >$key)
format /etc/daxcrypt/test.img --sparse --size 32M
main_pid() { systemctl show -p MainPID --value daxcrypt@test.service; }
active() { [ "$(systemctl is-active "$1")" = active ]; }
socket=/run/daxcrypt/test.sock

systemctl start daxcrypt@test.socket
[ "$(systemctl is-active daxcrypt@test.service)" = inactive ] || fail "the service runs before the first connection"
attach /dev/nbd0
wait_for active daxcrypt@test.service
make_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
write_tree /mnt/fs systemd
verify_tree /mnt/fs systemd
umount /mnt/fs
detach /dev/nbd0

# The sandbox and the limits are those of the unit.
pid=$(main_pid)
status() { awk -v name="$1:" '$1 == name { print $2 }' "/proc/$pid/status"; }
[ "$(status NoNewPrivs)" = 1 ] || fail "the service may gain privileges"
[ "$(status Seccomp)" = 2 ] || fail "no system call filter"
[ "$(status CapBnd)$(status CapEff)" = 00000000000000000000000000000000 ] || fail "capabilities: $(status CapBnd) $(status CapEff)"
[ "$(status VmLck)" != 0 ] || fail "no memory is locked"
grep -q '^Max core file size  *0  *0 ' "/proc/$pid/limits" || fail "core dumps are allowed"
[ "$(stat -c %a $socket)" = 600 ] || fail "the socket has mode $(stat -c %a $socket)"
expect_failure nsenter -t "$pid" -m touch /etc/canary
expect_failure test -e /etc/canary

# A crash is restarted, on the socket that stayed.
kill -9 "$pid"
restarted() { [ "$(main_pid)" != "$pid" ] && [ "$(main_pid)" != 0 ] && active daxcrypt@test.service; }
attach /dev/nbd0
wait_for restarted
check_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
verify_tree /mnt/fs systemd
umount /mnt/fs
detach /dev/nbd0

systemctl stop daxcrypt@test.socket daxcrypt@test.service
[ "$(systemctl show -p Result --value daxcrypt@test.service)" = success ] || fail "the service ended with $(systemctl show -p Result --value daxcrypt@test.service)"
[ "$(systemctl show -p ExecMainStatus --value daxcrypt@test.service)" = 0 ] || fail "exit status $(systemctl show -p ExecMainStatus --value daxcrypt@test.service)"
kernel_is_quiet 'systemd.[0-9]+.:|Failed to connect stdout to the journal'
