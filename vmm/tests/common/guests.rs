//! The guests' code, entered in 32-bit protected mode with flat segments.
//!
//! Addresses inside a guest are set as `label - start + 0x100000`: the code is assembled wherever
//! this program has it, and runs at `BASE`.

use std::arch::global_asm;

/// Counts loops; see [`TICKER`].
pub const LOOPS: u64 = 0x20_0000;
/// Counts timer interrupts.
pub const TICKS: u64 = 0x20_0004;
/// Counts the times the TSC ran backwards.
pub const BACKWARDS: u64 = 0x20_0010;
/// Counts port reads that gave something else than they should.
pub const BAD_READS: u64 = 0x20_0014;
/// As long as this is not zero, [`echo`] does not listen.
pub const DEAF: u64 = 0x20_0018;
/// Has [`entropy`] reset the machine, once.
pub const RESET: u64 = 0x20_001c;
/// Has the first vCPU of [`smp`] write to each page from 4 MiB to 6 MiB between two counts.
pub const WRITES: u64 = 0x20_0020;
/// Counts how often [`rebooter`] has begun.
pub const BOOTS: u64 = 0x30_0000;
/// Where each of the other vCPUs counts: four bytes each, by APIC ID.
pub const AP_LOOPS: u64 = 0x20_0100;

macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $start:ident, $end:ident) => {
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            // SAFETY: the assembler puts both symbols into one section, the code between them.
            unsafe {
                let (start, end) = (&raw const $start, &raw const $end);
                std::slice::from_raw_parts(start, end.offset_from(start) as usize)
            }
        }
    };
}

guest!(
    /// Prints "hello" and powers off.
    hello, guest_hello_start, guest_hello_end
);
guest!(
    /// Counts loops and PIT interrupts, watches the TSC and port reads.
    ticker, guest_ticker_start, guest_ticker_end
);
guest!(
    /// Starts all other vCPUs, which count for themselves, and then counts as well.
    smp, guest_smp_start, guest_smp_end
);
guest!(
    /// Counts TSC deadline interrupts, each of which sets the next deadline: one that is lost is
    /// the last.
    deadline, guest_deadline_start, guest_deadline_end
);
guest!(
    /// Jumps to where no memory is, which no KVM can emulate.
    lost, guest_lost_start, guest_lost_end
);
guest!(
    /// Faults until it cannot.
    triple_fault, guest_fault_start, guest_fault_end
);
guest!(
    /// Asks the keyboard controller for a reset.
    reset, guest_reset_start, guest_reset_end
);
guest!(
    /// Counts how often it began at `BOOTS`, starts all other vCPUs, which count for themselves, and waits
    /// for the second one. Then it resets the machine: by the keyboard controller, the chipset and a triple
    /// fault, in turn. The fourth time it counts at `LOOPS` instead.
    rebooter, guest_rebooter_start, guest_rebooter_end
);
guest!(
    /// Says "boot" by the serial port each time it begins, and resets the machine after a second of a TSC of
    /// 2 GHz. Meanwhile it writes to each page from 2 MiB to 4 MiB.
    again, guest_again_start, guest_again_end
);
guest!(
    /// Resets the machine at once, by a triple fault, each time it begins.
    storm, guest_fault_start, guest_fault_end
);
guest!(
    /// Writes one word into each page from 2 MiB to 4 MiB, then counts at `LOOPS`.
    toucher, guest_toucher_start, guest_toucher_end
);
guest!(
    /// Writes a number that goes up into each page from 2 MiB to 4 MiB in turn, for ever.
    writer, guest_writer_start, guest_writer_end
);
guest!(
    /// Gives back what comes in by the serial port.
    echo, guest_echo_start, guest_echo_end
);
guest!(
    /// Drives a virtio-rng in the first place on the PCI bus, one request after the other: counts
    /// those that came back at `LOOPS`, their interrupts at `TICKS`, and at `BAD_READS` those that
    /// brought nothing new. It waits for each interrupt, so that one that is lost is the last.
    entropy, guest_entropy_start, guest_entropy_end
);

global_asm!(
    r#"
    .pushsection .rodata.guests, "a"
    .code32

    .globl guest_hello_start
    guest_hello_start:
        .set hello_text_at, hello_text - guest_hello_start + 0x100000
        mov esi, offset hello_text_at
        mov edx, 0x3f8
    1:  lodsb
        test al, al
        jz 2f
        out dx, al
        jmp 1b
    2:  mov edx, 0x604
        mov eax, 0x2000
        out dx, ax
    3:  hlt
        jmp 3b
    hello_text:
        .asciz "hello\n"
    .globl guest_hello_end
    guest_hello_end:

    .globl guest_ticker_start
    guest_ticker_start:
        mov esp, 0x80000
        # Gate 0x20 of an IDT at 0x180000.
        .set ticker_irq_at, ticker_irq - guest_ticker_start + 0x100000
        mov eax, offset ticker_irq_at
        mov word ptr [0x180100], ax
        mov word ptr [0x180102], 0x10
        mov word ptr [0x180104], 0x8e00
        shr eax, 16
        mov word ptr [0x180106], ax
        mov word ptr [0x180800], 0x7ff
        mov dword ptr [0x180802], 0x180000
        lidt [0x180800]
        # Both PICs: vectors 0x20 and 0x28, only line 0 open.
        mov al, 0x11
        out 0x20, al
        out 0xa0, al
        mov al, 0x20
        out 0x21, al
        mov al, 0x28
        out 0xa1, al
        mov al, 4
        out 0x21, al
        mov al, 2
        out 0xa1, al
        mov al, 1
        out 0x21, al
        out 0xa1, al
        mov al, 0xfe
        out 0x21, al
        mov al, 0xff
        out 0xa1, al
        # PIT channel 0, rate generator, some 500 Hz.
        mov al, 0x34
        out 0x43, al
        mov al, 0x52
        out 0x40, al
        mov al, 0x09
        out 0x40, al
        sti
        xor edi, edi
        xor ebx, ebx
    1:  inc dword ptr [0x200000]
        rdtsc
        cmp edx, edi
        jb 2f
        ja 3f
        cmp eax, ebx
        jae 3f
    2:  inc dword ptr [0x200010]
    3:  mov edi, edx
        mov ebx, eax
        # A port that is not there, then the serial port's scratch register: each read must give
        # what it should however often the vCPU is paused in the middle of it.
        mov edx, 0x2000
        xor eax, eax
        in eax, dx
        cmp eax, 0xffffffff
        jne 4f
        mov edx, 0x3ff
        mov al, 0x5a
        out dx, al
        xor eax, eax
        in al, dx
        cmp al, 0x5a
        je 1b
    4:  inc dword ptr [0x200014]
        jmp 1b
    ticker_irq:
        push eax
        inc dword ptr [0x200004]
        mov al, 0x20
        out 0x20, al
        pop eax
        # What IRET does, by instructions that every KVM can emulate.
        push dword ptr [esp + 8]
        popfd
        retf 4
    .globl guest_ticker_end
    guest_ticker_end:

    .globl guest_smp_start
    guest_smp_start:
        # The others begin in real mode at 0x8000.
        .set ap_start_at, ap_start - guest_smp_start + 0x100000
        .set ap_len, ap_end - ap_start
        .set ap_gdtr_at, ap_gdtr - ap_start + 0x8000
        .set ap_protected_at, ap_protected - ap_start + 0x8000
        mov esi, offset ap_start_at
        mov edi, 0x8000
        mov ecx, offset ap_len
        rep movsb
        # APIC on, then INIT and two SIPIs to all but self.
        mov dword ptr [0xfee000f0], 0x1ff
        mov dword ptr [0xfee00300], 0xc4500
        mov ecx, 2
    1:  mov dword ptr [0xfee00300], 0xc4608
        mov edx, 2000
    2:  dec edx
        jnz 2b
        loop 1b
    3:  inc dword ptr [0x200000]
        cmp dword ptr [0x200020], 0
        je 3b
        mov edi, 0x400000
    4:  inc dword ptr [edi]
        add edi, 4096
        cmp edi, 0x600000
        jb 4b
        jmp 3b
    .code16
    ap_start:
        cli
        xor ax, ax
        mov ds, ax
        .byte 0x66, 0x0f, 0x01, 0x16 # lgdt, with a 32-bit base
        .word ap_gdtr_at
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0x66, 0xea # far jump to 0x10:ap_protected
        .long ap_protected_at
        .word 0x10
    .code32
    ap_protected:
        mov ax, 0x18
        mov ds, ax
        mov ebx, dword ptr [0xfee00020]
        shr ebx, 24
    1:  inc dword ptr [0x200100 + ebx * 4]
        jmp 1b
    ap_gdtr:
        .word 0x27
        .long 0x500
    ap_end:
    .globl guest_smp_end
    guest_smp_end:

    .globl guest_deadline_start
    guest_deadline_start:
        mov esp, 0x80000
        # Gate 0x30 of an IDT at 0x180000; both PICs masked.
        .set deadline_irq_at, deadline_irq - guest_deadline_start + 0x100000
        mov eax, offset deadline_irq_at
        mov word ptr [0x180180], ax
        mov word ptr [0x180182], 0x10
        mov word ptr [0x180184], 0x8e00
        shr eax, 16
        mov word ptr [0x180186], ax
        mov word ptr [0x180800], 0x7ff
        mov dword ptr [0x180802], 0x180000
        lidt [0x180800]
        mov al, 0xff
        out 0x21, al
        out 0xa1, al
        # APIC on; its timer in TSC deadline mode, vector 0x30.
        mov dword ptr [0xfee000f0], 0x1ff
        mov dword ptr [0xfee00320], 0x40030
        call set_deadline
        sti
    1:  inc dword ptr [0x200000]
        jmp 1b
    deadline_irq:
        pushad
        inc dword ptr [0x200004]
        mov dword ptr [0xfee000b0], 0
        call set_deadline
        popad
        push dword ptr [esp + 8]
        popfd
        retf 4
    set_deadline:
        rdtsc
        add eax, 4000000
        adc edx, 0
        mov ecx, 0x6e0
        wrmsr
        ret
    .globl guest_deadline_end
    guest_deadline_end:

    .globl guest_rebooter_start
    guest_rebooter_start:
        inc dword ptr [0x300000]
        # The others begin in real mode at 0x8000.
        mov dword ptr [0x200104], 0
        mov esi, offset rebooter_ap_at
        mov edi, 0x8000
        mov ecx, offset rebooter_ap_len
        rep movsb
        mov dword ptr [0xfee000f0], 0x1ff
        mov dword ptr [0xfee00300], 0xc4500
        mov ecx, 2
    1:  mov dword ptr [0xfee00300], 0xc4608
        mov edx, 2000
    2:  dec edx
        jnz 2b
        loop 1b
    3:  cmp dword ptr [0x200104], 0
        je 3b
        # A deadline timer that is armed, and interrupts that nobody could take.
        mov dword ptr [0xfee00320], 0x40030
        rdtsc
        add eax, 4000000
        adc edx, 0
        mov ecx, 0x6e0
        wrmsr
        mov eax, dword ptr [0x300000]
        cmp eax, 1
        je 4f
        cmp eax, 2
        je 5f
        cmp eax, 3
        je 6f
    7:  inc dword ptr [0x200000]
        jmp 7b
    4:  mov al, 0xfe
        out 0x64, al
        jmp 8f
    5:  mov edx, 0xcf9
        mov al, 6
        out dx, al
        jmp 8f
    6:  mov dword ptr [0x180802], 0
        mov word ptr [0x180800], 0
        lidt [0x180800]
        ud2
    8:  hlt
        jmp 8b
    rebooter_ap:
        .set rebooter_ap_at, rebooter_ap - guest_rebooter_start + 0x100000
        .set rebooter_ap_len, rebooter_ap_end - rebooter_ap
        .set rebooter_ap_gdtr_at, rebooter_ap_gdtr - rebooter_ap + 0x8000
        .set rebooter_ap_protected_at, rebooter_ap_protected - rebooter_ap + 0x8000
    .code16
        cli
        xor ax, ax
        mov ds, ax
        .byte 0x66, 0x0f, 0x01, 0x16 # lgdt, with a 32-bit base
        .word rebooter_ap_gdtr_at
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0x66, 0xea # far jump to 0x10:rebooter_ap_protected
        .long rebooter_ap_protected_at
        .word 0x10
    .code32
    rebooter_ap_protected:
        mov ax, 0x18
        mov ds, ax
        mov ebx, dword ptr [0xfee00020]
        shr ebx, 24
    1:  inc dword ptr [0x200100 + ebx * 4]
        jmp 1b
    rebooter_ap_gdtr:
        .word 0x27
        .long 0x500
    rebooter_ap_end:
    .globl guest_rebooter_end
    guest_rebooter_end:

    .globl guest_again_start
    guest_again_start:
        inc dword ptr [0x300000]
        .set again_text_at, again_text - guest_again_start + 0x100000
        mov esi, offset again_text_at
        mov edx, 0x3f8
    1:  lodsb
        test al, al
        jz 2f
        out dx, al
        jmp 1b
    2:  rdtsc
        mov ebx, eax
        mov esi, edx
        add ebx, 2000000000
        adc esi, 0
    3:  mov edi, 0x200000
    4:  inc dword ptr [edi]
        add edi, 4096
        cmp edi, 0x400000
        jb 4b
        rdtsc
        cmp edx, esi
        jb 3b
        ja 5f
        cmp eax, ebx
        jb 3b
    5:  mov al, 0xfe
        out 0x64, al
    6:  hlt
        jmp 6b
    again_text:
        .asciz "boot\n"
    .globl guest_again_end
    guest_again_end:

    .globl guest_entropy_start
    guest_entropy_start:
        mov esp, 0x80000
        # What a guest before this one may have left.
        mov dword ptr [0x200004], 0
        mov dword ptr [0x302000], 0
        mov dword ptr [0x301000], 0
        # Gate 0x41 of an IDT at 0x180000; both PICs masked; APIC on.
        .set entropy_irq_at, entropy_irq - guest_entropy_start + 0x100000
        mov eax, offset entropy_irq_at
        mov word ptr [0x180208], ax
        mov word ptr [0x18020a], 0x10
        mov word ptr [0x18020c], 0x8e00
        shr eax, 16
        mov word ptr [0x18020e], ax
        mov word ptr [0x180800], 0x7ff
        mov dword ptr [0x180802], 0x180000
        lidt [0x180800]
        mov al, 0xff
        out 0x21, al
        out 0xa1, al
        mov dword ptr [0xfee000f0], 0x1ff
        # MSI-X, the last capability of device 1: enabled; message 1 is vector 0x41.
        mov edx, 0xcf8
        mov eax, 0x80000898
        out dx, eax
        mov edx, 0xcfc
        in eax, dx
        cmp al, 0x11
        jne 9f
        mov edx, 0xcfe
        mov eax, 0x8000
        out dx, ax
        mov dword ptr [0xc0004010], 0xfee00000
        mov dword ptr [0xc0004014], 0
        mov dword ptr [0xc0004018], 0x41
        mov dword ptr [0xc000401c], 0
        # Acknowledged, driver, version 1, features agreed.
        mov byte ptr [0xc0000014], 3
        mov dword ptr [0xc0000008], 1
        mov dword ptr [0xc000000c], 1
        mov byte ptr [0xc0000014], 11
        # Queue 0: 8 chains, message 1, three pages at 3 MiB; ready.
        mov word ptr [0xc0000016], 0
        mov word ptr [0xc0000018], 8
        mov word ptr [0xc000001a], 1
        mov dword ptr [0xc0000020], 0x300000
        mov dword ptr [0xc0000028], 0x301000
        mov dword ptr [0xc0000030], 0x302000
        mov word ptr [0xc000001c], 1
        mov byte ptr [0xc0000014], 15
        # Descriptor 0: 64 bytes at 0x303000, for the device to write.
        mov dword ptr [0x300000], 0x303000
        mov dword ptr [0x300004], 0
        mov dword ptr [0x300008], 64
        mov dword ptr [0x30000c], 2
        xor ebx, ebx
        xor esi, esi
        sti
    1:  inc esi
        mov word ptr [0x301002], si
        mov word ptr [0xc0003000], 0
    2:  mov ax, word ptr [0x302002]
        cmp ax, si
        jne 2b
    3:  cmp dword ptr [0x200004], esi
        jne 3b
        mov eax, dword ptr [0x303000]
        cmp eax, ebx
        jne 4f
        inc dword ptr [0x200014]
    4:  mov ebx, eax
        inc dword ptr [0x200000]
        cmp dword ptr [0x20001c], 0
        je 1b
        mov dword ptr [0x20001c], 0
        mov al, 0xfe
        out 0x64, al
    7:  hlt
        jmp 7b
    9:  inc dword ptr [0x200014]
    8:  jmp 8b
    entropy_irq:
        inc dword ptr [0x200004]
        mov dword ptr [0xfee000b0], 0
        push dword ptr [esp + 8]
        popfd
        retf 4
    .globl guest_entropy_end
    guest_entropy_end:

    .globl guest_lost_start
    guest_lost_start:
        mov eax, 0xd0000000
        jmp eax
    .globl guest_lost_end
    guest_lost_end:

    .globl guest_fault_start
    guest_fault_start:
        mov dword ptr [0x180802], 0
        mov word ptr [0x180800], 0
        lidt [0x180800]
        ud2
    .globl guest_fault_end
    guest_fault_end:

    .globl guest_reset_start
    guest_reset_start:
        mov al, 0xfe
        out 0x64, al
    1:  hlt
        jmp 1b
    .globl guest_reset_end
    guest_reset_end:

    .globl guest_toucher_start
    guest_toucher_start:
        mov edi, 0x200000
    1:  mov dword ptr [edi + 8], edi
        add edi, 4096
        cmp edi, 0x400000
        jb 1b
    2:  inc dword ptr [0x200000]
        jmp 2b
    .globl guest_toucher_end
    guest_toucher_end:

    .globl guest_writer_start
    guest_writer_start:
        xor eax, eax
    1:  mov edi, 0x200000
    2:  inc eax
        mov dword ptr [edi], eax
        add edi, 4096
        cmp edi, 0x400000
        jb 2b
        jmp 1b
    .globl guest_writer_end
    guest_writer_end:

    .globl guest_echo_start
    guest_echo_start:
    1:  inc dword ptr [0x200000]
        cmp dword ptr [0x200018], 0
        jne 1b
        mov edx, 0x3fd
        in al, dx
        test al, 1
        jz 1b
        mov edx, 0x3f8
        in al, dx
        out dx, al
        jmp 1b
    .globl guest_echo_end
    guest_echo_end:

    .code64
    .popsection
    "#
);
