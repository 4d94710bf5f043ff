# Scenario 3: TCP with TLS and client certificates. nbd-client attaches and a filesystem works; then the server goes away
# three times, twice by kill -9, in the middle of a copy onto ext4, and the copy ends without an error: tools/nbd-attach
# hands the kernel a new connection, and the kernel sends again what had no reply.
#
# Why not nbd-client -persist: it connects again when the ioctl NBD_DO_IT fails, and that succeeds when the server hangs up.
. /scenarios/lib.sh
mkdir -p /mnt/fs
mark
listen=127.0.0.1:10809
pieces=10
format /run/tcp.img --sparse --size 32M --label tcp
head -c $((pieces * 1048576)) /dev/urandom >/run/data.img

# Port 10809 in state LISTEN.
listening() { grep -q ':2A39 00000000:0000 0A' /proc/net/tcp; }
start() {
  serve /run/tcp.img --listen $listen --tls-certificates /etc/tls --tls-verify-client
  wait_for listening
}
tls_client() {
  nbd-client 127.0.0.1 10809 /dev/nbd0 -N tcp -cacertfile /etc/tls/ca-cert.pem -tlshostname localhost \
    -certfile /etc/tls/client-cert.pem -keyfile /etc/tls/client-key.pem "$@"
}

start
# The certificate is asked for: without one there is no export.
expect_failure nbd-client 127.0.0.1 10809 /dev/nbd0 -N tcp
expect_failure nbd-client 127.0.0.1 10809 /dev/nbd0 -N tcp -cacertfile /etc/tls/ca-cert.pem -tlshostname localhost
tls_client
wait_for has_size /dev/nbd0
make_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
write_tree /mnt/fs tls
verify_tree /mnt/fs tls
umount /mnt/fs
detach /dev/nbd0

# What -persist does here, for the record: it is nbd-client's business, so it is no verdict.
tls_client -persist -nonetlink -nofork >/run/persist.out 2>&1 &
persistent=$!
wait_for has_size /dev/nbd0
stop_server
start
sleep 2
if is_free /dev/nbd0; then echo "NOTE: nbd-client -persist: not attached any more after the server was restarted"; else echo "NOTE: nbd-client -persist: attached again"; fi
nbd-client -d /dev/nbd0 || true
kill $persistent || true
wait $persistent || true
wait_for is_free /dev/nbd0

start_attacher tcp:$listen /dev/nbd0 --name tcp --tls /etc/tls --tls-hostname localhost --timeout 2 --retry 0.2
check_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
verify_tree /mnt/fs tls
echo 0 >/run/progress
copy() {
  piece=0
  while [ $piece -lt $pieces ]; do
    dd if=/run/data.img of=/mnt/fs/copy bs=64k count=16 skip=$((piece * 16)) seek=$((piece * 16)) conv=notrunc,fsync || exit 1
    piece=$((piece + 1))
    echo $piece >/run/progress
  done
}
copied() { [ "$(cat /run/progress)" -ge "$1" ]; }
copy &
copier=$!
for stop in 2 4 7; do
  wait_for copied $stop
  if [ $stop = 4 ]; then
    stop_server
  else
    kill -9 "$server"
    wait "$server" || true
  fi
  ! copied $pieces || fail "the copy was over before the server went away"
  sleep 0.5
  start
done
wait $copier || fail "the copy met an error"
again=$(grep -c 'connected again' /run/attach.out)
[ "$again" -ge 3 ] || fail "connected again $again times in 3 restarts"
cmp /run/data.img /mnt/fs/copy || fail "the copy differs"
umount /mnt/fs
stop_attacher /dev/nbd0

tls_client
wait_for has_size /dev/nbd0
check_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
verify_tree /mnt/fs tls
cmp /run/data.img /mnt/fs/copy || fail "the copy differs after all"
umount /mnt/fs
detach /dev/nbd0
stop_server
rm /run/tcp.img /run/data.img
# The driver tells of each lost connection. An I/O error would be one too many, but for the reads of `-persist`'s device.
kernel_is_quiet 'block nbd0: (Send|Receive|Request send|Dead connection|Connection timed out|Other side|Attempted send|not configured)|nbd0: (reconnected|Connection timed out)'
