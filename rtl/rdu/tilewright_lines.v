// The behaviour of an off-chip memory: lines of bytes, any number of ports, all synchronous. A read of a line that is
// being written gives the old data; where ports write the same byte in one tick, the last of them does. A testbench may
// access `mem` directly.
module tilewright_lines #(
    parameter WIDTH = 128,
    parameter DEPTH = 1024,
    parameter PORTS = 1,
    parameter ADDRESS = DEPTH > 1 ? $clog2(DEPTH) : 1,
    parameter LANES = WIDTH / 8
) (
    input  wire                     clk,
    input  wire [PORTS-1:0]         read_enable,
    input  wire [PORTS*ADDRESS-1:0] read_address,
    output reg  [PORTS*WIDTH-1:0]   read_data,
    input  wire [PORTS*LANES-1:0]   write_enable,
    input  wire [PORTS*ADDRESS-1:0] write_address,
    input  wire [PORTS*WIDTH-1:0]   write_data
);
  reg [WIDTH-1:0] mem [0:DEPTH-1];

  wire [PORTS*WIDTH-1:0] mask;
  genvar lane;
  generate
    for (lane = 0; lane < PORTS * LANES; lane = lane + 1) begin : lanes
      assign mask[lane*8 +: 8] = {8{write_enable[lane]}};
    end
  endgenerate

  integer port;
  always @(posedge clk) begin
    for (port = 0; port < PORTS; port = port + 1)
      if (read_enable[port]) read_data[port*WIDTH +: WIDTH] <= mem[read_address[port*ADDRESS +: ADDRESS]];
    for (port = 0; port < PORTS; port = port + 1)
      if (|write_enable[port*LANES +: LANES])
        mem[write_address[port*ADDRESS +: ADDRESS]] =
            (mem[write_address[port*ADDRESS +: ADDRESS]] & ~mask[port*WIDTH +: WIDTH])
            | (write_data[port*WIDTH +: WIDTH] & mask[port*WIDTH +: WIDTH]);
  end

  integer word;
  initial begin
    read_data = {PORTS*WIDTH{1'b0}};
    for (word = 0; word < DEPTH; word = word + 1) mem[word] = {WIDTH{1'b0}};
  end
endmodule
