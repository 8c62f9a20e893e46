#!/usr/bin/env bash
# Runs programs under Linux on an emulated Ice Lake (Bochs), which has AVX-512 with VNNI.
#   vnni.sh CACHE PROGRAM ARGUMENTS [PROGRAM ARGUMENTS]...
# Prints what they print. Fails unless all of them succeed. What it needs, it installs with apt-get.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"; cache=$(realpath "$1"); shift
say() { printf 'vnni: %s\n' "$*" >&2; }
exec 9>"$cache/lock"; flock 9

missing() { ! command -v "$1" >/dev/null; }
if missing bochs-bin || missing genisoimage || missing cpio || [ ! -e /usr/lib/ISOLINUX/isolinux.bin ]; then
  if missing apt-get || [ "$(id -u)" != 0 ]; then
    say "install bochs, bochsbios, vgabios, isolinux, syslinux-common, genisoimage and cpio"; exit 1
  fi
  apt-get -qq update >&2
  DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends \
    bochs bochsbios vgabios isolinux syslinux-common genisoimage cpio >&2
fi
if [ ! -e "$cache/vmlinuz" ]; then
  say "fetching a kernel"
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -1)
  rm -rf "$cache/kernel"; mkdir -p "$cache/kernel"
  (cd "$cache/kernel" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2 \
    && dpkg-deb --fsys-tarfile ./*.deb | tar -x --wildcards './boot/vmlinuz-*')
  mv "$cache"/kernel/boot/vmlinuz-* "$cache/vmlinuz"; rm -rf "$cache/kernel"
fi

# The system: one program that runs the others, those, and the libraries they load.
made=$cache/made; rm -rf "$made"; mkdir -p "$made/system/t" "$made/iso/isolinux"
cc -O2 -static -o "$made/system/init" "$here/vnni_init.c"
count=0
while [ $# -gt 1 ]; do
  count=$((count + 1)); strip -o "$made/system/t/$count" "$1"
  printf 't/%s %s\n' "$count" "$2" >>"$made/system/commands"
  ldd "$1" | grep -o '/[^ ]*' | while read -r lib; do
    mkdir -p "$made/system$(dirname "$lib")"; cp -L "$lib" "$made/system$lib"
  done
  shift 2
done
(cd "$made/system" && find . | cpio -o -H newc -R 0:0 --quiet) >"$made/iso/initrd"
cp "$cache/vmlinuz" "$made/iso/"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$made/iso/isolinux/"

# Features that Linux must not use, by its numbers for them: FSRM (580; Bochs has it without ERMS, which the kernel's memmove
# does not survive), PKU, XSAVEC and XSAVES (515, 321, 323; Bochs 2.7 gives sizes for them that Linux refuses, and with
# them AVX).
cat >"$made/iso/isolinux/isolinux.cfg" <<END
default l
prompt 0
label l
  kernel /vmlinuz
  initrd /initrd
  append console=ttyS0,115200 quiet nokaslr mitigations=off tsc=reliable clearcpuid=580,515,321,323 panic=-1 rdinit=/init
END
genisoimage -quiet -o "$made/boot.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
  -no-emul-boot -boot-load-size 4 -boot-info-table "$made/iso"
cat >"$made/bochsrc" <<END
config_interface: textconfig
display_library: rfb, options="timeout=0"
megs: 512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model=corei7_icelake_u, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none, time0=1700000000
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$made/boot.iso, status=inserted
boot: cdrom
sound: driver=dummy
com1: enabled=1, mode=file, dev=$made/serial.txt
log: $made/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
END
# Debian builds Bochs with its debugger, which waits for a command: go on.
echo c >"$made/go"
say "running on the emulated processor: some minutes"
# Its own exit status is always 1.
timeout 1800 bochs-bin -q -f "$made/bochsrc" -rc "$made/go" </dev/null >"$made/bochs.out" 2>&1 || true
tr -d '\r' <"$made/serial.txt"
if ! grep -q avx512_vnni "$made/serial.txt"; then say "the emulated processor has no VNNI"; exit 1; fi
if grep -q 'skipped: no avx512vnni' "$made/serial.txt"; then say "the tests did not see VNNI"; exit 1; fi
grep -q "^=== all done: $count ran, 0 failed" "$made/serial.txt" || { say "not all succeeded: $made/serial.txt"; exit 1; }
