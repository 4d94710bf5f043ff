# Scenario 1: ext4 and xfs over /dev/nbd0, block sizes, connections, trim, and a restart of the server in between.
. /scenarios/lib.sh
mkdir -p /mnt/fs

# one FILESYSTEM DISCARDS NBD_OPTIONS...
one() {
  kind=$1 discards=$2
  shift 2
  mark
  if [ "$discards" = yes ]; then format /run/fs.img --sparse --size 96M --allow-discards; else format /run/fs.img --sparse --size 96M; fi
  serve /run/fs.img
  attach /dev/nbd0 "$@"
  make_$kind /dev/nbd0
  mount -t "$kind" /dev/nbd0 /mnt/fs
  write_tree /mnt/fs a
  verify_tree /mnt/fs a
  head -c 8000000 /dev/urandom >/mnt/fs/temporary
  sync
  rm /mnt/fs/temporary
  sync
  before=$(du -k /run/fs.img | cut -f 1)
  if [ "$discards" = yes ]; then
    fstrim /mnt/fs
    after=$(du -k /run/fs.img | cut -f 1)
    [ "$after" -lt $((before - 4000)) ] || fail "fstrim left $after KiB of $before KiB"
  else
    expect_failure fstrim /mnt/fs
    [ "$(du -k /run/fs.img | cut -f 1)" -ge "$before" ] || fail "fstrim punched holes without --allow-discards"
  fi
  verify_tree /mnt/fs a
  umount /mnt/fs
  detach /dev/nbd0
  stop_server
  serve /run/fs.img
  attach /dev/nbd0 "$@"
  check_$kind /dev/nbd0
  mount -t "$kind" /dev/nbd0 /mnt/fs
  verify_tree /mnt/fs a
  umount /mnt/fs
  detach /dev/nbd0
  stop_server
  rm /run/fs.img
  kernel_is_quiet
}

one ext4 no
one ext4 yes -b 4096 -C 4
one xfs yes -C 4
one xfs no -b 4096
