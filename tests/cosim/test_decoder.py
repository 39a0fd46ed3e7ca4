"""The host decoder, tick by tick in Amaranth's own simulator."""

import pytest
from amaranth.hdl import Module
from amaranth.lib.memory import Memory
from amaranth.sim import Simulator

from tilewright.arch.hostmap import HostMap, Region
from tilewright.rtl.host import HostDecoder, HostDecoderSignature

HOSTMAP = HostMap([Region("registers", 3, 20), Region("status", 2, 40), Region("memory", 6, 40)])


def simulate(bench):
    m = Module()
    m.submodules.decoder = decoder = HostDecoder(HOSTMAP)
    m.submodules.memory = memory = Memory(shape=64, depth=6, init=[])
    read, write = memory.read_port(), memory.write_port(granularity=32)
    port = decoder.memory
    m.d.comb += [read.addr.eq(port.addr), read.en.eq(port.re), port.rdata.eq(read.data)]
    m.d.comb += [write.addr.eq(port.addr), write.data.eq(port.wdata), write.en.eq(port.we)]

    async def testbench(ctx):
        host = decoder.host

        async def write_word(address, word):
            ctx.set(host.addr, address)
            ctx.set(host.wdata, word)
            ctx.set(host.we, 1)
            await ctx.tick()
            ctx.set(host.we, 0)

        async def read_word(address):
            ctx.set(host.addr, address)
            await ctx.tick()
            ctx.set(host.addr, 0)  # the word belongs to the address that was sampled
            return ctx.get(host.rdata)

        ctx.set(decoder.done, 1)
        await bench(ctx, decoder, write_word, read_word)

    simulator = Simulator(m)
    simulator.add_clock(1e-9)
    simulator.add_testbench(testbench)
    simulator.run()


def test_every_word_of_the_map_keeps_its_own_value():
    async def bench(ctx, decoder, write, read):
        # Only the bits that a region has are kept: 20 of a register, words of 32 in a memory element.
        expected = {}
        for region in ("registers", "memory"):
            for element in range(HOSTMAP[region].elements):
                for word in range(HOSTMAP[region].element_words):
                    address = HOSTMAP.base(region, element) + word
                    value = 0x80000000 + (address + 1) * 0x1001
                    await write(address, value)
                    expected[address] = value & 0xFFFFF if region == "registers" else value
        ctx.set(decoder.status[0], 0x12_3456_789A)
        ctx.set(decoder.status[1], 0xFF_0000_0001)
        base = HOSTMAP.base("status")
        expected |= {base: 0x3456789A, base + 1: 0x12, base + 2: 1, base + 3: 0xFF}
        seen = {address: await read(address) for address in range(2 * HOSTMAP.words())}
        assert {a: v for a, v in seen.items() if v} == expected

    simulate(bench)


def test_writes_and_start_are_ignored_during_a_run():
    async def bench(ctx, decoder, write, read):
        register, memory = HOSTMAP.base("registers", 2), HOSTMAP.base("memory", 5)
        await write(register, 7)
        await write(memory, 8)
        ctx.set(decoder.done, 0)
        ctx.set(decoder.host.start, 1)
        await write(register, 1)
        await write(memory, 2)
        assert ctx.get(decoder.start) == 0 and ctx.get(decoder.host.done) == 0
        ctx.set(decoder.done, 1)
        await ctx.delay(0)
        assert ctx.get(decoder.start) == 1 and ctx.get(decoder.host.done) == 1
        assert [await read(register), await read(memory)] == [7, 8]

    simulate(bench)


def test_memories_are_enabled_for_their_own_elements_only():
    async def bench(ctx, decoder, write, read):
        base = HOSTMAP.base("memory")
        ctx.set(decoder.host.we, 1)
        seen = []
        for address in range(2 * HOSTMAP.words()):
            ctx.set(decoder.host.addr, address)
            await ctx.delay(0)
            if ctx.get(decoder.memory.re) or ctx.get(decoder.memory.we):
                seen.append((address, ctx.get(decoder.memory.re), ctx.get(decoder.memory.we)))
        # 6 elements of two words; the block of 16 words has room for two more, which are nobody's.
        assert seen == [(base + i, 1, 1 << i % 2) for i in range(12)]
        ctx.set(decoder.host.addr, base)
        ctx.set(decoder.done, 0)
        await ctx.delay(0)
        assert ctx.get(decoder.memory.re) == 0 and ctx.get(decoder.memory.we) == 0

    simulate(bench)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (
            [Region("registers", 1, 33), Region("status", 1)],
            "region registers: element_bits must be at most 32",
        ),
        ([Region("registers", 1), Region("status", 1, 65)], "region status: element_bits must be at most 64"),
        ([Region("registers", 1), Region("status", 1), Region("done", 1)], "done is taken"),
    ],
)
def test_maps_that_cannot_be_decoded(regions, message):
    with pytest.raises(ValueError, match=message):
        HostDecoderSignature(HostMap(regions), "registers", "status")
