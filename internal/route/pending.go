package route

// The compiled parts of a Plan.
type (
	piece       struct{}
	condition   struct{}
	pathRewrite struct{}
	faults      struct{}
)

// AppendPath appends the path that is sent in place of path, with its query.
func (p *Plan) AppendPath(dst, path []byte) []byte { return append(dst, path...) }

// AppendHost appends the host that is sent in place of authority.
func (p *Plan) AppendHost(dst, authority []byte) []byte { return append(dst, p.host...) }

// AppendValue appends the value of the field that is added.
func (e *Edit) AppendValue(dst []byte, c Context) []byte { return append(dst, e.value...) }
