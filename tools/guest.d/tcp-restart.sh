# Scenario 3: nbd-client over TCP with -persist, and a server that restarts in the middle of a copy. Without TLS.
#
# -persist alone does not survive it on this kernel with this nbd-client (3.24, 6.1): NBD_DO_IT returns without an error
# when the server hangs up, and nbd-client takes that for the end. So a loop attaches again, as systemd's Restart= would,
# and the copy repeats a piece whose request met the restart (nbd-client does not ask the kernel to hold them).
. /scenarios/lib.sh
mark
listen=127.0.0.1:10809
pieces=12
format /run/tcp.img --sparse --size 16M --label tcp
head -c $((pieces * 1048576)) /dev/urandom >/run/data.img

# Port 10809 in state LISTEN.
listening() { grep -q ':2A39 00000000:0000 0A' /proc/net/tcp; }
start() {
  serve /run/tcp.img --listen $listen
  wait_for listening
}
copy_piece() { dd if=/run/data.img of=/dev/nbd0 bs=64k count=16 skip=$(($1 * 16)) seek=$(($1 * 16)) oflag=direct conv=notrunc,fsync; }
copy() {
  piece=0
  while [ $piece -lt $pieces ]; do
    tries=0
    until copy_piece $piece; do
      echo "piece $piece again"
      echo again >>/run/again
      tries=$((tries + 1))
      [ $tries -lt 300 ] || exit 1
      sleep 0.2
    done
    piece=$((piece + 1))
    echo $piece >/run/progress
  done
}
copied() { [ "$(cat /run/progress)" -ge "$1" ]; }

start
: >/run/again
echo 0 >/run/progress
touch /run/wanted
while [ -e /run/wanted ]; do
  nbd-client 127.0.0.1 10809 /dev/nbd0 -N tcp -persist -nonetlink -nofork || true
  sleep 0.3
done &
attacher=$!
wait_for has_size /dev/nbd0
copy &
copier=$!
for stop in 3 7; do
  wait_for copied $stop
  stop_server
  ! copied $pieces || fail "the copy was over before the restart"
  sleep 1
  start
done
wait $copier || fail "the copy did not complete"
[ -s /run/again ] || fail "no request met the restart: nothing was tested"
blockdev --flushbufs /dev/nbd0
dd if=/dev/nbd0 bs=1M count=$pieces iflag=direct | cmp - /run/data.img || fail "the copy differs"
rm /run/wanted
detach /dev/nbd0
wait $attacher
stop_server
rm /run/tcp.img /run/data.img
# Requests that met the restart fail, and the kernel says so; nothing else may.
kernel_is_quiet '(I\/O error, dev nbd0|Buffer I\/O error on dev nbd0|nbd0: (Send|Receive|Other side|Connection|Attempted send|Dead connection|.*reconnect))'
