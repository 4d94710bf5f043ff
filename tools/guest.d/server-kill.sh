# Scenario 6, the other half: kill -9 of the server while ext4 on its export writes. The kernel then sees I/O errors, as it
# would of a dying disk; a new server must have every file whose fsync had returned, and e2fsck nothing to say.
. /scenarios/lib.sh
. /scenarios/durable.sh
mkdir -p /mnt/kill
mark
format /run/kill.img --size 40M
serve /run/kill.img
attach /dev/nbd0
make_ext4 /dev/nbd0
total=0
: >/run/durable
for round in $(seq "$kills"); do
  # The machine's host takes silence for death.
  echo "== server-kill: $round of $kills" >/dev/console
  mount -t ext4 /dev/nbd0 /mnt/kill
  rm -f /mnt/kill/f* /mnt/kill/log
  sync
  write_for_ever kill >/run/report &
  writer=$!
  wait_for test -s /run/report
  sleep_up_to 2500
  kill -9 "$server"
  wait "$server" || true
  # Requests without a reply hang until the device is detached: nbd-client sets no timeout.
  nbd-client -d /dev/nbd0
  wait $writer
  umount /mnt/kill
  wait_for is_free /dev/nbd0
  durable /run/report >/run/durable
  total=$((total + $(wc -l </run/durable)))

  serve /run/kill.img
  attach /dev/nbd0
  mount -t ext4 /dev/nbd0 /mnt/kill || fail "does not mount after kill $round"
  verify_durable kill /run/durable
  umount /mnt/kill
  check_ext4 /dev/nbd0
done
[ $total -ge "$kills" ] || fail "only $total files were durable in $kills kills: nothing was tested"
echo "NOTE: $kills kills of the server, $total durable files verified"
detach /dev/nbd0
stop_server
rm /run/kill.img
kernel_is_quiet 'nbd0'
