# Scenario 2: a partition table with two mounted file systems on /dev/nbd0; swap on /dev/nbd0.
. /scenarios/lib.sh
mkdir -p /mnt/one /mnt/two
mark
format /run/disk.img --sparse --size 96M
serve /run/disk.img
attach /dev/nbd0
printf 'label: gpt\nsize=48MiB\nsize=+\n' | sfdisk -q /dev/nbd0
wait_for test -b /dev/nbd0p2
for n in 1 2; do mkfs.ext4 -q /dev/nbd0p$n; done
mount -t ext4 /dev/nbd0p1 /mnt/one
mount -t ext4 /dev/nbd0p2 /mnt/two
write_tree /mnt/one one
write_tree /mnt/two two
verify_tree /mnt/one one
verify_tree /mnt/two two
umount /mnt/one
umount /mnt/two
detach /dev/nbd0
stop_server

# The table is on media: a new server shows the same partitions.
serve /run/disk.img
attach /dev/nbd0
blockdev --rereadpt /dev/nbd0
wait_for test -b /dev/nbd0p2
check_ext4 /dev/nbd0p1
check_ext4 /dev/nbd0p2
mount -t ext4 /dev/nbd0p1 /mnt/one
mount -t ext4 /dev/nbd0p2 /mnt/two
verify_tree /mnt/one one
verify_tree /mnt/two two
umount /mnt/one
umount /mnt/two
detach /dev/nbd0
stop_server

# Swap: a memory control group forces pages out, and what comes back is what went.
rm /run/disk.img
format /run/disk.img --sparse --size 96M
serve /run/disk.img
attach /dev/nbd0
mkswap /dev/nbd0
swapon /dev/nbd0
mkdir -p /run/cgroup /mnt/swapped
mount -t cgroup2 none /run/cgroup
echo +memory >/run/cgroup/cgroup.subtree_control
mkdir /run/cgroup/small
echo 8M >/run/cgroup/small/memory.high
mount -t tmpfs -o size=40M tmpfs /mnt/swapped
sh -c 'echo $$ >/run/cgroup/small/cgroup.procs; head -c 16000000 /dev/urandom >/mnt/swapped/pages; sha256sum </mnt/swapped/pages >/run/swap.sum'
used=$(awk '$1 == "/dev/nbd0" { print $4 }' /proc/swaps)
[ "$used" -gt 4000 ] || fail "only $used KiB were swapped"
swapoff /dev/nbd0
[ "$(sha256sum </mnt/swapped/pages)" = "$(cat /run/swap.sum)" ] || fail "pages came back from swap different"
umount /mnt/swapped
rmdir /run/cgroup/small
umount /run/cgroup
detach /dev/nbd0
stop_server
rm /run/disk.img
kernel_is_quiet
