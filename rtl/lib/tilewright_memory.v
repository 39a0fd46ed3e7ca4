// The behaviour of a large memory: one read port, one write port, both synchronous. A read of the word that is being
// written gives the old data. A testbench may access `mem` directly, or have a file of $readmemh read into it: put its
// path into `load_path`, then let `load` rise.
module tilewright_memory #(
    parameter WIDTH = 32,
    parameter DEPTH = 1024,
    parameter GRANULARITY = WIDTH,
    parameter ADDRESS = DEPTH > 1 ? $clog2(DEPTH) : 1,
    parameter LANES = WIDTH / GRANULARITY
) (
    input  wire               clk,
    input  wire               read_enable,
    input  wire [ADDRESS-1:0] read_address,
    output reg  [WIDTH-1:0]   read_data,
    input  wire [LANES-1:0]   write_enable,
    input  wire [ADDRESS-1:0] write_address,
    input  wire [WIDTH-1:0]   write_data
);
  reg [WIDTH-1:0] mem [0:DEPTH-1];

  wire [WIDTH-1:0] mask;
  genvar lane;
  generate
    for (lane = 0; lane < LANES; lane = lane + 1) begin : lanes
      assign mask[lane*GRANULARITY +: GRANULARITY] = {GRANULARITY{write_enable[lane]}};
    end
  endgenerate

  always @(posedge clk) begin
    if (read_enable) read_data <= mem[read_address];
    if (|write_enable) mem[write_address] <= (mem[write_address] & ~mask) | (write_data & mask);
  end

  integer word;
  initial begin
    read_data = {WIDTH{1'b0}};
    for (word = 0; word < DEPTH; word = word + 1) mem[word] = {WIDTH{1'b0}};
  end

  reg        load = 1'b0;
  reg [8191:0] load_path = 8192'b0;
  always @(posedge load) $readmemh(load_path, mem);
endmodule
