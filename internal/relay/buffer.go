package relay

import "sync"

// buffer is what a half copies through.
type buffer [bulk]byte

// buffers keeps them between turns. The garbage collector empties it, so a burst does not stay in memory.
var buffers = sync.Pool{New: func() any { return new(buffer) }}

func takeBuffer() *buffer  { return buffers.Get().(*buffer) }
func giveBuffer(b *buffer) { buffers.Put(b) }
