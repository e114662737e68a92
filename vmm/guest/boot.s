# From the loader's 32-bit entry to Rust in 64-bit mode, for the first vCPU and for the others; and the
# interrupt handlers. Symbols of constants come from main.rs.

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18              # "Xen\0", one address, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

# --- first vCPU: PVH hands over in 32-bit protected mode, ebx = start info ---
    .section .text.boot, "ax", @progbits
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    mov $stacks + STACK_SIZE, %esp
    mov %ebx, %ebp              # kept until Rust takes it

    # PML4 → PDPT → four directories of 2 MiB pages: the first 4 GiB, one to one.
    mov $pdpt + 3, %eax
    mov %eax, pml4
    mov $directories + 3, %eax
    mov $pdpt, %edi
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $8, %edi
    add $4096, %eax
    loop 1b
    mov $0x83, %eax             # present, writable, 2 MiB
    mov $directories, %edi
    mov $2048, %ecx
2:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    loop 2b

    call enter_long_mode
    ljmp $8, $first_64

# Control registers for long mode; the caller jumps to a 64-bit segment next.
enter_long_mode:
    lgdt boot_gdtr
    mov %cr4, %eax
    or $0x20, %eax              # PAE
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx       # EFER: LME
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax        # paging, protection
    mov %eax, %cr0
    ret

    .align 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 64-bit code
    .quad 0x00cf93000000ffff    # data
    .quad 0x00cf9b000000ffff    # 32-bit code, for the trampoline
boot_gdtr:
    .word . - boot_gdt - 1
    .long boot_gdt

    .code64
first_64:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $stacks + STACK_SIZE, %rsp
    mov %ebp, %edi
    call first_main
halt:
    cli
    hlt
    jmp halt

# --- the other vCPUs: copied to TRAMPOLINE, entered in real mode ---
    .global trampoline, trampoline_end
    .code16
trampoline:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ds
    lgdtl TRAMPOLINE + trampoline_gdtr - trampoline
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $24, $trampoline_32
    .align 4
trampoline_gdtr:
    .word 31
    .long boot_gdt
trampoline_end:

    .code32
trampoline_32:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $trampoline_stack_end, %esp
    call enter_long_mode
    ljmp $8, $other_64

    .code64
other_64:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov starting, %edi          # started one at a time: this is our number
    mov %rdi, %rax
    inc %rax
    imul $STACK_SIZE, %rax
    lea stacks(%rax), %rsp
    call other_main
    jmp halt

# --- interrupts ---
# They run on a stack of their own (IST), for an exception may be the stack's fault. Timers are counted
# here and not in Rust: a few instructions, and no registers to save but three. A handler finds its
# vCPU by the number of its local APIC.
    .macro enter
    push %rax
    push %rcx
    push %rdx
    mov $0xfee00020, %ecx       # an absolute operand would be sign-extended
    mov (%rcx), %ecx
    shr $24, %ecx
    .endm
    .macro leave_with_eoi
    mov $0xfee000b0, %ecx
    movl $0, (%rcx)
    pop %rdx
    pop %rcx
    pop %rax
    iretq
    .endm

    .global on_timer, on_pit, on_spurious
on_timer:
    enter
    incq timer_ticks(, %rcx, 8)
    mov timer_period, %rcx      # TSC ticks; 0: the timer is periodic by itself
    test %rcx, %rcx
    jz 1f
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    add %rcx, %rax
    mov %rax, %rdx
    shr $32, %rdx
    mov $0x6e0, %ecx            # IA32_TSC_DEADLINE
    wrmsr
1:  leave_with_eoi

on_pit:
    enter
    incq pit_ticks
    leave_with_eoi

on_spurious:
    iretq

# Exceptions: vector and rip go to Rust, which reports and stops.
    .altmacro
    .macro exception number
exception_\number:
    .if (\number == 8) || ((\number >= 10) && (\number <= 14)) || (\number == 17) || (\number == 21)
    pop %rsi                    # error code
    .endif
    mov (%rsp), %rsi            # rip
    mov $\number, %edi
    jmp on_exception
    .endm
    .set vector, 0
    .rept 32
    exception %vector
    .set vector, vector + 1
    .endr
    .noaltmacro

    .section .rodata
    .global exceptions
    .align 8
    .altmacro
    .macro address number
    .quad exception_\number
    .endm
exceptions:
    .set vector, 0
    .rept 32
    address %vector
    .set vector, vector + 1
    .endr
    .noaltmacro

    .section .bss
    .align 4096
    .global pml4, pdpt, directories
pml4:        .skip 4096
pdpt:        .skip 4096
directories: .skip 4 * 4096
    .skip 512
trampoline_stack_end:
    .align 16
    .global stacks
stacks:      .skip STACK_SIZE * 64
