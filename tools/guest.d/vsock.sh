# The vsock listener. The machine that the tests run on offers its guests no vsock (no vhost-vsock), so the kernel's
# loopback transport stands for it: server and client use the same calls, only the transport below them is another.
. /scenarios/lib.sh
mkdir -p /mnt/fs
mark
modprobe vsock_loopback
format /run/vsock.img --sparse --size 32M --label one
serve /run/vsock.img --listen vsock:10809
start_attacher vsock:1:10809 /dev/nbd0 --name one
make_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
write_tree /mnt/fs vsock
verify_tree /mnt/fs vsock
umount /mnt/fs
stop_attacher /dev/nbd0
# The bytes are the ones that every other way in shows.
attach /dev/nbd1 -N one
check_ext4 /dev/nbd1
mount -t ext4 /dev/nbd1 /mnt/fs
verify_tree /mnt/fs vsock
umount /mnt/fs
detach /dev/nbd1
stop_server
rm /run/vsock.img
kernel_is_quiet 'block nbd0: (Send|Receive|Dead connection|not configured)'
