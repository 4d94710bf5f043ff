# `daxcrypt lock --wait` while ext4 on the export is being copied to, and `unlock` a while later: the copy stands still
# meanwhile and then goes on; nobody sees an error, and every checksum is right, then and after a new mount.
. /scenarios/lib.sh
mkdir -p /mnt/lock
mark
control=/run/lock.control
status() { daxcrypt status --control $control --json; }
is_locked() { status | grep -q '"locked":true'; }

format /run/lock.img --size 64M
serve /run/lock.img --control $control
attach /dev/nbd0
make_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/lock
mkdir -p /run/lock.from
for file in $(seq 24); do head -c 1000000 /dev/urandom >/run/lock.from/$file; done
(cd /run/lock.from && sha256sum * >/run/lock.sums)

# Each file is made durable by itself, so that the copy really is at the export.
(for file in $(seq 24); do cp /run/lock.from/$file /mnt/lock/ && sync /mnt/lock/$file && echo $file >>/run/lock.copied; done; echo ended >>/run/lock.copied) &
copy=$!
wait_for test -s /run/lock.copied
daxcrypt lock lock --control $control --wait
is_locked || fail "it is not locked"
grep -q ended /run/lock.copied && fail "the copy ended before the lock: nothing was tested"
copied=$(wc -l </run/lock.copied)
# A file whose sync was answered just before the lock may still be noted.
sleep 1
standing=$(wc -l </run/lock.copied)
[ "$standing" -le $((copied + 1)) ] || fail "the copy went on while it was locked"
sleep 10
[ "$(wc -l </run/lock.copied)" = "$standing" ] || fail "the copy went on while it was locked"
(umask 077; head -c 64 /dev/urandom >/run/wrong.key)
expect_failure daxcrypt unlock lock --control $control --key-file /run/wrong.key
kill -0 $copy || fail "the copy has given up"
daxcrypt unlock lock --control $control --key-file $key
wait $copy || fail "the copy ended with $?"
[ "$(tail -n 1 /run/lock.copied)" = ended ] || fail "the copy stopped before its end"
# As after a suspend: locked with nothing under way, too.
daxcrypt lock --all --control $control --wait
daxcrypt unlock lock --control $control --key-file $key
sync
echo 3 >/proc/sys/vm/drop_caches
(cd /mnt/lock && sha256sum -c /run/lock.sums >/run/verify.out 2>&1) || fail "checksums differ: $(grep -v ': OK' /run/verify.out | head -n 3 | tr '\n' ' ')"
umount /mnt/lock
mount -t ext4 /dev/nbd0 /mnt/lock
(cd /mnt/lock && sha256sum -c /run/lock.sums >/run/verify.out 2>&1) || fail "checksums differ after a new mount"
umount /mnt/lock
check_ext4 /dev/nbd0
detach /dev/nbd0
stop_server
rm -rf /run/lock.img /run/lock.from /run/lock.copied /run/wrong.key
kernel_is_quiet
